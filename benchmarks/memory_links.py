"""The whole server with CPU ranks of one host: one rank, several that exchange over Mooncake, and
several that share memory. All instances run all the time, and the load goes to one after the other,
so that other work on the machine affects all alike. Prints medians of tokens per second, and of the
CPU milliseconds that all ranks together take for a token.

    python -m benchmarks.memory_links --ranks 4 --rounds 5 --concurrency 1,8,32
"""

from __future__ import annotations

import argparse
import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from cli.bench.loads import ServeLoad
from cli.bench.serve import measure
from cli.bench.temporary_instance import temporary_instance
from cli.bench.temporary_options import TemporaryInstanceOptions
from cli.observe.status import read_status
from cli.run_dir import Target
from shared.clock import SystemClock
from shared.errors import Unavailable

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_OVER_MOONCAKE = "memory_links=false"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """`title` says its ranks and how they exchange."""

    title: str
    target: Target
    pids: tuple[int, ...]  # of its ranks

    def cpu_s(self) -> float:
        """What its ranks have used so far."""
        total = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total * _TICK_S


@dataclass(frozen=True, slots=True)
class Sample:
    tokens_per_s: float
    cpu_ms: float  # a token


async def start(stack: AsyncExitStack, title: str, ranks: int, options: list[str]) -> Instance:
    own = TemporaryInstanceOptions(ranks=ranks, device="cpu", rank_options=options)
    name = title.lower().replace(" ", "-").replace(",", "")
    target = await stack.enter_async_context(
        temporary_instance(
            [*own.flags(), "--instance", f"{name}-{os.getpid()}"], environment=own.environment()
        )
    )
    status = await read_status(target, SystemClock())
    return Instance(title=title, target=target, pids=tuple(rank["pid"] for rank in status["ranks"]))


async def sample(instance: Instance, load: ServeLoad) -> Sample:
    """Raises Unavailable if a request fails."""
    if instance.target.url is None:
        raise Unavailable("the instance has no gateway")
    cpu_from = instance.cpu_s()
    (row,) = await measure(instance.target.url, load, SystemClock())
    if row.errors:
        raise Unavailable(f"{instance.title}: {row.errors} requests failed")
    # `measure` begins with two requests that do not count.
    tokens = (row.concurrency * load.rounds + 2) * load.new_tokens
    return Sample(row.tokens_per_s, 1000 * (instance.cpu_s() - cpu_from) / tokens)


async def run(ranks: int, concurrencies: list[int], rounds: int, console: Console) -> None:
    async with AsyncExitStack() as stack:
        instances = [
            await start(stack, "1 rank", 1, []),
            await start(stack, f"{ranks} ranks, Mooncake", ranks, [_OVER_MOONCAKE]),
            await start(stack, f"{ranks} ranks, memory", ranks, []),
        ]
        for concurrency in concurrencies:
            load = ServeLoad(
                concurrency=str(concurrency),
                prompt_tokens=32,
                new_tokens=48,
                rounds=3 if concurrency < 8 else 1,
            )
            found: dict[str, list[Sample]] = {each.title: [] for each in instances}
            for _ in range(rounds):
                for instance in instances:
                    one = await sample(instance, load)
                    found[instance.title].append(one)
                    console.print(f"  {instance.title:20} {one}", style="dim")
            for title, samples in found.items():
                rate = median(each.tokens_per_s for each in samples)
                cpu_ms = median(each.cpu_ms for each in samples)
                console.print(f"{concurrency:3}  {title:20} {rate:8.1f} tokens/s {cpu_ms:7.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", default="1,8,32")
    args = parser.parse_args()
    concurrencies = [int(each) for each in args.concurrency.split(",")]
    asyncio.run(run(args.ranks, concurrencies, args.rounds, Console()))


if __name__ == "__main__":
    main()
