"""Measures what a streamed token costs the gateway in CPU time, against aiohttp alone.

    python -m benchmarks.gateway --streams 64 --tokens 32 --rounds 5

One gateway process serves toy ranks that give every stream one token a step, with a real etcd
between them. The floor is a process of aiohttp alone, on uvloop as the gateway is: its handler
decodes nothing and writes as many events of the same size in the same rhythm. Both are measured in
turn in one run, by the CPU time of their processes, so that other load on the machine matters
little. With `--against FOLDER` so is the gateway of another checkout, which has the same ranks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
import uvloop
from aiohttp import web

from shared.codec import pack
from shared.embedded_etcd import embedded_etcd
from shared.etcd_permissions import EtcdService
from shared.etcd_store import connect_store
from shared.keys import Keys
from tests.support.cluster import free_port
from tests.support.gateway_harness import GatewayHarness, toy_spec
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import ToyRank

EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
    b'"created":1700000000,"model":"toy-moe","choices":[{"index":0,"delta":{"content":"abcd"},'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)


async def serve_floor(port: int, step_s: float) -> None:
    """aiohttp alone, on uvloop as the gateway is. Its streams wake together, as a step's do."""
    stepped = asyncio.Event()

    async def tick() -> None:
        nonlocal stepped
        while True:
            await asyncio.sleep(step_s)
            before, stepped = stepped, asyncio.Event()
            before.set()

    async def stream(request: web.Request) -> web.StreamResponse:
        count = json.loads(await request.read())["max_tokens"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(count):
            await stepped.wait()
            await response.write(EVENT)
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", stream)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await tick()


def cpu_s(pid: int) -> float:
    """Of all threads that live, to the nanosecond."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


@asynccontextmanager
async def child(
    *command: str, folder: Path | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stderr=asyncio.subprocess.DEVNULL, cwd=folder
    )
    try:
        yield process
    finally:
        process.terminate()
        await process.wait()


async def read_stream(http: aiohttp.ClientSession, url: str, tokens: int) -> None:
    body = {
        "messages": [{"role": "user", "content": "What is a starfish?"}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    async with http.post(url + "/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for _ in response.content.iter_any():
            pass


async def measure(
    http: aiohttp.ClientSession, url: str, pid: int, streams: int, tokens: int
) -> float:
    """CPU seconds for so many streams at once."""
    before = cpu_s(pid)
    await asyncio.gather(*[read_stream(http, url, tokens) for _ in range(streams)])
    return cpu_s(pid) - before


async def wait_for(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await read_stream(http, url, 1)
                return
            except (aiohttp.ClientError, AssertionError):
                await asyncio.sleep(0.1)


class Side(NamedTuple):
    """A process that is measured."""

    name: str
    url: str
    pid: int


async def run(options: argparse.Namespace) -> None:
    keys = Keys("bench")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            embedded_etcd(Path(folder) / "etcd") as etcd,
            aiohttp.ClientSession(connector=connector) as http,
            AsyncExitStack() as children,
        ):
            store = await connect_store(etcd.root)
            await etcd.admit(keys)
            reach = etcd.options(keys, EtcdService.GATEWAY).flags()
            gateway = ("-m", "gateway", *reach, "--instance", keys.instance)
            floor = ("-m", "benchmarks.gateway", "--step-ms", str(options.step_ms), "--floor-port")

            async def start(name: str, *command: str, root: Path | None = None) -> Side:
                port = free_port()
                process = await children.enter_async_context(
                    child(*command, str(port), folder=root)
                )
                return Side(name, f"http://127.0.0.1:{port}", process.pid)

            flags = (*gateway, *options.gateway_flags, "--port")
            sides = [await start("gateway", *flags)]
            if options.against is not None:
                sides.append(await start("the other", *flags, root=options.against))
            sides.append(await start("aiohttp alone", *floor))
            await store.put(keys.spec, pack(toy_spec(Path(folder), num_ranks=options.ranks)))
            harness = GatewayHarness(store, keys, http, port=0)
            ranks = [
                await harness.add_rank(ToyRank(n, step_s=options.step_ms / 1e3))
                for n in range(options.ranks)
            ]
            await harness.publish(ranks)
            for side in sides:
                await wait_for(http, side.url)
            await report(http, options, sides)
            for rank in ranks:
                await rank.kill()
            await store.close()


async def report(
    http: aiohttp.ClientSession, options: argparse.Namespace, sides: Sequence[Side]
) -> None:
    """A line per side: microseconds per streamed token, and milliseconds per request of one token
    and of `--tokens`; in brackets, times that of aiohttp alone."""
    streams, tokens = options.streams, options.tokens
    costs: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for _ in range(options.rounds):
        for name, url, pid in sides:
            short = await measure(http, url, pid, streams, 1)
            long = await measure(http, url, pid, streams, tokens)
            costs[name].append((short / streams, (long - short) / streams / (tokens - 1)))
    shown: dict[str, tuple[float, float, float]] = {}
    for name, pairs in costs.items():
        request_ms = statistics.median(short for short, _ in pairs) * 1e3
        token_us = statistics.median(token for _, token in pairs) * 1e6
        shown[name] = request_ms, token_us, request_ms + token_us * (tokens - 1) / 1e3
    floor = shown[sides[-1].name]
    for name, values in shown.items():
        request, token, whole = (
            f"{value:7.2f} {unit} ({value / least:4.2f})"
            for value, unit, least in zip(values, ("ms", "us", "ms"), floor, strict=True)
        )
        print(f"{name:14} one token {request}   streamed token {token}   {tokens} tokens {whole}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64, help="streams at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a stream")
    parser.add_argument("--ranks", type=int, default=2, help="toy ranks")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, in turn")
    parser.add_argument("--step-ms", type=float, default=20.0, help="a step of the toy ranks")
    parser.add_argument("--against", type=Path, help="measure the gateway of this checkout as well")
    parser.add_argument("--floor-port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("gateway_flags", nargs="*", help="after --: more flags of the gateway")
    options = parser.parse_args()
    if options.floor_port:
        uvloop.run(serve_floor(options.floor_port, options.step_ms / 1e3))
    else:
        asyncio.run(run(options))


if __name__ == "__main__":
    main()
