"""Measures what authentication costs a gateway in CPU time: API keys, and the instance's secret at
the ranks' control ports.

    python -m benchmarks.authentication --streams 32 --tokens 64 --rounds 12

Two gateway processes serve toy ranks, which give every stream one token a step, over one etcd with
certificates and users. The one wants an API key and its ranks the instance's secret, the other
neither. Both are measured in turn, in changing order, by the CPU time of their processes, so that
other load on the machine matters little. What is not in it: the handshake of each connection
between processes, which is made once.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.gateway import child, measure, wait_for
from cli.bench.stats import percentile
from cli.keys import add_entry, key_entry
from shared.api_key import new_api_key
from shared.codec import pack
from shared.embedded_etcd import EmbeddedEtcd, embedded_etcd
from shared.etcd_permissions import EtcdService
from shared.etcd_store import connect_store
from shared.handshake import Access
from shared.keys import Keys
from shared.secret import create_secret, read_secret
from tests.support.cluster import free_port
from tests.support.gateway_harness import GatewayHarness, toy_spec
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import ToyRank

NUM_RANKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    http: aiohttp.ClientSession
    url: str
    pid: int


async def serve(
    stack: AsyncExitStack, etcd: EmbeddedEtcd, folder: Path, step_s: float, *, authenticated: bool
) -> Served:
    """An instance of its own."""
    keys, port = Keys("on" if authenticated else "off"), free_port()
    await etcd.admit(keys)
    store = await connect_store(etcd.root)
    stack.push_async_callback(store.close)
    flags: list[str] = []
    headers: dict[str, str] = {}
    access = Access(keys.instance)
    if authenticated:
        file, secret, key = folder / "keys.toml", folder / "secret", new_api_key()
        add_entry(file, "bench", key_entry("bench", key))
        create_secret(secret)
        flags = ["--api-key-file", str(file), "--secret-file", str(secret)]
        headers = {"Authorization": f"Bearer {key}"}
        access = Access(keys.instance, read_secret(secret))
    reach = etcd.options(keys, EtcdService.GATEWAY).flags()
    command = ("-m", "gateway", *reach, "--instance", keys.instance, "--port", str(port), *flags)
    process = await stack.enter_async_context(child(*command))
    connector = aiohttp.TCPConnector(limit=0)
    http = await stack.enter_async_context(
        aiohttp.ClientSession(connector=connector, headers=headers)
    )
    harness = GatewayHarness(store, keys, http, port)
    await store.put(keys.spec, pack(toy_spec(folder, num_ranks=NUM_RANKS)))
    ranks = []
    for number in range(NUM_RANKS):
        rank = ToyRank(number, step_s=step_s)
        ranks.append(await harness.add_rank(rank))
        rank.access = access
        stack.push_async_callback(rank.kill)
    await harness.publish(ranks)
    await wait_for(http, harness.url)
    return Served(http=http, url=harness.url, pid=process.pid)


async def run(options: argparse.Namespace) -> None:
    rng = random.Random(1)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_tokenizer(folder)
        etcd = await stack.enter_async_context(embedded_etcd(folder / "etcd"))
        step_s = options.step_ms / 1e3
        both = {
            authenticated: await serve(stack, etcd, folder, step_s, authenticated=authenticated)
            for authenticated in (False, True)
        }
        used: dict[bool, list[float]] = {False: [], True: []}
        for number in range(options.rounds + 1):
            for which in rng.sample([False, True], 2):
                served = both[which]
                seconds = await measure(
                    served.http, served.url, served.pid, options.streams, options.tokens
                )
                if number:  # the first round warms up
                    used[which].append(seconds)
    report(used, options)


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Where the geometric mean lies with 95 %."""
    logs = [math.log(ratio) for ratio in ratios]
    error = 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.fmean(logs)
    return math.exp(mean - error), math.exp(mean + error)


def report(used: dict[bool, list[float]], options: argparse.Namespace) -> None:
    num_tokens = options.streams * options.tokens
    for which, name in ((False, "without"), (True, "with")):
        median = statistics.median(used[which])
        print(
            f"{name}: {1e6 * median / num_tokens:.1f} µs of CPU a token, "
            f"{1e6 * median / options.streams:.0f} µs a stream of {options.tokens}"
        )
    ratios = [on / off for off, on in zip(used[False], used[True], strict=True)]
    of_medians = statistics.median(used[True]) / statistics.median(used[False])
    low, high = interval(ratios)
    print(f"95 % interval of the rounds' mean: {low:.4f} … {high:.4f}")
    print(
        f"with / without: medians {of_medians:.4f}, of rounds {percentile(ratios, 25):.3f} … "
        f"{statistics.median(ratios):.3f} … {percentile(ratios, 75):.3f} "
        f"(quartiles of {len(ratios)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=32, help="at once")
    parser.add_argument("--tokens", type=int, default=64, help="of each stream")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--step-ms", type=float, default=5.0, help="of the toy ranks")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
