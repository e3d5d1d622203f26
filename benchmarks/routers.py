"""Compares Starfish's gateway, with each of its routing policies, with routers that others publish.

    python -m benchmarks.routers load   --sglang-router PYTHON --vllm-router PYTHON
    python -m benchmarks.routers faults --sglang-router PYTHON --vllm-router PYTHON

PYTHON is an interpreter in whose environment that router is installed. `load`: each has the same
number of processes behind it that cost nearly nothing (HTTP backends behind a router, toy ranks
behind the gateway). What a request takes, how many there can be a second, what they cost in CPU
time; in turn, in one run. `faults`: `kill -9` and SIGSTOP of one of three while streams run and
requests come. A router has the same HTTP backends, which need no time to go on with a stream, and
no work to share; Starfish is a whole instance with a model, `starfish up --ranks 3`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
import uvloop

from benchmarks.gateway import cpu_s
from benchmarks.router_load import FaultEffect, closed_loop, watch_fault
from cli.bench.stats import percentile
from cli.bench.stream_client import StreamClient, random_prompts, run_all, stream_client
from cli.bench.temporary_instance import temporary_instance
from cli.observe.read_view import read_view
from shared.clock import SystemClock
from shared.codec import pack
from shared.embedded_etcd import embedded_etcd
from shared.errors import StarfishError
from shared.etcd_permissions import EtcdService
from shared.etcd_store import connect_store
from shared.keys import Keys
from shared.rank_signal import send_to_rank
from shared.records import pack_map
from shared.types import ROUTING_POLICIES
from tests.support.cluster import free_port
from tests.support.gateway_harness import MODEL, toy_map, toy_spec
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import ToyRank

START_S = 300.0
SHORT = {"model": MODEL, "prompt": "What is a starfish?", "max_tokens": 1, "temperature": 0}
GATEWAY = "gateway"
DIRECT = "no router"
ROUTERS = {
    "sglang-router": (
        "sglang_router.launch_router",
        ("round_robin", "power_of_two", "cache_aware"),
    ),
    "vllm-router": ("vllm_router.launch_router", ("round_robin", "power_of_two", "cache_aware")),
}
FAULTS = (signal.SIGKILL, signal.SIGSTOP)


class Subject(NamedTuple):
    """What is measured: `pid` is the process whose CPU time counts; `backends` are those of HTTP
    behind it."""

    name: str
    url: str
    pid: int
    backends: Sequence[asyncio.subprocess.Process] = ()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@asynccontextmanager
async def child(*command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        for number in (signal.SIGCONT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
        await process.wait()


@asynccontextmanager
async def started(
    subject: str, router: str, *, number: int, step_ms: float
) -> AsyncIterator[Subject]:
    """`subject` is the gateway, a router, or one of the backends alone, ready to answer; in
    `router` an interpreter and a policy are named if it has any."""
    async with AsyncExitStack() as stack:
        if subject == GATEWAY:
            found = await _start_gateway(stack, router, number, step_ms)
        else:
            found = await _start_router(stack, subject, router, number, step_ms)
        await _wait_for(found.url)
        yield found


async def _start_backends(
    stack: AsyncExitStack, number: int, step_ms: float
) -> list[tuple[int, asyncio.subprocess.Process]]:
    backends = []
    for _ in range(number):
        port = free_port()
        command = (sys.executable, "-m", "benchmarks.router_backends", "--port", str(port))
        process = await stack.enter_async_context(child(*command, "--step-ms", str(step_ms)))
        backends.append((port, process))
    for port, _ in backends:
        await _wait_for(f"http://127.0.0.1:{port}")
    return backends


async def _start_router(
    stack: AsyncExitStack, name: str, router: str, number: int, step_ms: float
) -> Subject:
    backends = await _start_backends(stack, number, step_ms)
    processes = [process for _, process in backends]
    if name == DIRECT:
        port, process = backends[0]
        return Subject(name, f"http://127.0.0.1:{port}", process.pid, processes)
    python, policy = router.rsplit(":", 1)
    port = free_port()
    process = await stack.enter_async_context(
        child(
            *(python, "-m", ROUTERS[name][0], "--host", "127.0.0.1", "--port", str(port)),
            *("--policy", policy, "--prometheus-port", str(free_port())),
            *("--worker-urls", *(f"http://127.0.0.1:{port}" for port, _ in backends)),
        )
    )
    return Subject(f"{name} {policy}", f"http://127.0.0.1:{port}", process.pid, processes)


async def _start_gateway(
    stack: AsyncExitStack, policy: str, number: int, step_ms: float
) -> Subject:
    keys = Keys("bench")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    write_tokenizer(folder)
    etcd = await stack.enter_async_context(embedded_etcd(folder / "etcd"))
    store = await connect_store(etcd.root)
    stack.push_async_callback(store.close)
    await etcd.admit(keys)
    await store.put(keys.spec, pack(toy_spec(folder, num_ranks=number)))
    ranks = [ToyRank(rank) for rank in range(number)]
    for rank in ranks:
        rank.port = free_port()
        command = (sys.executable, "-m", "benchmarks.router_backends", "--port", str(rank.port))
        own = ("--rank", str(rank.member.rank), "--instance", keys.instance)
        await stack.enter_async_context(child(*command, "--step-ms", str(step_ms), *own))
        await store.put(keys.rank(rank.member.rank, rank.member.incarnation), pack(rank.record()))
    await store.put(keys.map, pack_map(toy_map(1, [rank.member for rank in ranks])))
    port = free_port()
    reach = etcd.options(keys, EtcdService.GATEWAY).flags()
    process = await stack.enter_async_context(
        child(
            *(sys.executable, "-m", "gateway", *reach, "--instance", keys.instance),
            *("--port", str(port), "--routing", policy, "--no-access-log", "--log-level", "error"),
        )
    )
    return Subject(f"{GATEWAY} {policy}", f"http://127.0.0.1:{port}", process.pid)


async def _wait_for(url: str) -> None:
    async with aiohttp.ClientSession() as http, asyncio.timeout(START_S):
        while True:
            try:
                async with http.post(url + "/v1/completions", json=SHORT) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)


class Load(NamedTuple):
    """Of one subject: a request alone, requests at once, and streams at once."""

    alone_ms: float
    alone_p99_ms: float
    requests_per_s: float
    request_cpu_ms: float
    stream_cpu_ms: float


async def measure_load(subject: Subject, streams: Subject, options: argparse.Namespace) -> Load:
    """`streams` is the same as `subject`, with longer steps."""
    alone = await closed_loop(subject.port, SHORT, connections=1, for_s=options.for_s)
    before = cpu_s(subject.pid)
    together = await closed_loop(
        subject.port, SHORT, connections=options.connections, for_s=options.for_s
    )
    request_cpu_s = (cpu_s(subject.pid) - before) / len(together)
    body = SHORT | {"stream": True, "max_tokens": options.tokens, "ignore_eos": True}
    before = cpu_s(streams.pid)
    streamed = await closed_loop(
        streams.port, body, connections=options.connections, for_s=options.for_s
    )
    return Load(
        alone_ms=percentile(alone, 50) * 1e3,
        alone_p99_ms=percentile(alone, 99) * 1e3,
        requests_per_s=len(together) / options.for_s,
        request_cpu_ms=request_cpu_s * 1e3,
        stream_cpu_ms=(cpu_s(streams.pid) - before) / len(streamed) * 1e3,
    )


def subjects(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(subject, router) for `started`."""
    found = [(DIRECT, "")]
    pythons = {"sglang-router": options.sglang_router, "vllm-router": options.vllm_router}
    for name, (_, policies) in ROUTERS.items():
        if pythons[name]:
            found += [(name, f"{pythons[name]}:{policy}") for policy in policies]
    found += [(GATEWAY, policy) for policy in ROUTING_POLICIES]
    wanted = options.only or [""]
    return [each for each in found if any(part in f"{each[0]} {each[1]}" for part in wanted)]


async def run_load(options: argparse.Namespace) -> None:
    loads: dict[str, list[Load]] = {}
    for round_number in range(options.rounds):
        for subject, router in subjects(options):
            number = 1 if subject == DIRECT else options.backends
            async with (
                started(subject, router, number=number, step_ms=1) as quick,
                started(subject, router, number=number, step_ms=20) as slow,
            ):
                load = await measure_load(quick, slow, options)
            loads.setdefault(quick.name, []).append(load)
            print(f"round {round_number + 1}: {quick.name}: {load}", file=sys.stderr, flush=True)
    for name, found in loads.items():
        load = Load(*map(statistics.median, zip(*found, strict=True)))
        print(
            f"{name:32} one at a time {load.alone_ms:6.2f} ms (p99 {load.alone_p99_ms:6.2f})   "
            f"{load.requests_per_s:6.0f} requests/s   CPU: a request {load.request_cpu_ms:5.2f} ms,"
            f" a stream of {options.tokens} tokens {load.stream_cpu_ms:5.2f} ms"
        )


async def router_fault(
    subject: str, router: str, number: signal.Signals, options: argparse.Namespace
) -> tuple[str, FaultEffect]:
    async with started(subject, router, number=3, step_ms=options.step_ms) as found:
        victim = found.backends[0]
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
            # Not `stream_client`: a router's list of models may be no JSON by its header.
            client = StreamClient(http, found.url, MODEL, SystemClock())

            def repair() -> None:
                with contextlib.suppress(ProcessLookupError):
                    victim.send_signal(signal.SIGCONT)

            effect = await _watch(client, lambda: victim.send_signal(number), repair, options)
        return found.name, effect


async def starfish_fault(
    policy: str, number: signal.Signals, options: argparse.Namespace
) -> tuple[str, FaultEffect]:
    environment = {"STARFISH_GATEWAY_ROUTING": policy}
    async with temporary_instance(["--ranks", "3"], environment=environment) as target:
        view = await read_view(target)
        record = view.record_of(0)
        assert record is not None, "it is ready"
        assert target.url is not None, "it was started with a gateway"
        async with stream_client(target.url, SystemClock()) as client:
            await run_all(client, random_prompts(9, options.streams, 16), 8)  # warms it up

            def repair() -> None:
                if number is signal.SIGSTOP:
                    with contextlib.suppress(StarfishError, ProcessLookupError):
                        os.kill(record.pid, signal.SIGCONT)

            effect = await _watch(client, lambda: send_to_rank(record, number), repair, options)
        return f"starfish {policy}", effect


async def _watch(
    client: StreamClient,
    fault: Callable[[], None],
    repair: Callable[[], None],
    options: argparse.Namespace,
) -> FaultEffect:
    return await watch_fault(
        client,
        options.streams,
        num_tokens=options.fault_tokens,
        fault=fault,
        repair=repair,
        fault_at_s=options.fault_tokens * options.step_ms / 1e3 / 3,
        lasts_s=options.lasts_s,
        per_s=10.0,
    )


async def run_faults(options: argparse.Namespace) -> None:
    for number in FAULTS:
        for _ in range(options.rounds):
            for subject, router in subjects(options):
                if subject == DIRECT:
                    continue
                if subject == GATEWAY:
                    name, effect = await starfish_fault(router, number, options)
                else:
                    name, effect = await router_fault(subject, router, number, options)
                print(f"{number.name} {name:28} {effect.line(options.fault_tokens)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("load", "faults"))
    parser.add_argument("--sglang-router", default="", help="an interpreter that has it")
    parser.add_argument("--vllm-router", default="", help="an interpreter that has it")
    parser.add_argument("--only", action="append", help="router or policy; repeatable")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, in turn")
    parser.add_argument("--backends", type=int, default=2, help="load: behind each")
    parser.add_argument("--connections", type=int, default=32, help="load: at once")
    parser.add_argument("--tokens", type=int, default=32, help="load: of a stream")
    parser.add_argument("--for-s", type=float, default=4.0, help="load: of each measurement")
    parser.add_argument("--streams", type=int, default=12, help="faults: streams that run")
    parser.add_argument("--fault-tokens", type=int, default=150, help="faults: of a stream")
    parser.add_argument("--step-ms", type=float, default=30.0, help="faults: of HTTP backends")
    parser.add_argument("--lasts-s", type=float, default=15.0, help="faults: until SIGCONT")
    options = parser.parse_args()
    uvloop.run(run_load(options) if options.what == "load" else run_faults(options))


if __name__ == "__main__":
    main()
