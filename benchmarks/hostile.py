"""Measures what one hostile client costs another: the other's time between tokens, in peace and
under each attack, in one run.

    python -m benchmarks.hostile --rounds 5 --seconds 4

`starfish up` with two API keys. The one client reads a few streams all the time. The hostile one is
a process of its own (`benchmarks.hostile_client`), at a low priority: a real one has a machine of
its own, but here its work is done on the same cores. So after each attack comes a *control*: the
same process asks nobody for anything, but computes for as much CPU time as the attack has cost it.
In each round every attack has its turn, with peace before it; the order changes. Each attack is
compared with the peace and the control of its own turns, so that other load on the machine matters
little.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.hostile_client import ATTACKS, EVERYTHING, SPEND
from benchmarks.process_times import HOSTILE, CpuTimes, cpu_times, difference
from cli.bench.stats import percentile
from cli.bench.stream_client import (
    StreamClient,
    StreamRecord,
    random_prompts,
    served_name,
    stream_client,
)
from cli.bench.temporary_instance import temporary_instance
from cli.client_headers import VARIABLE
from cli.keys import add_entry, key_entry
from cli.run_dir import Target
from shared.api_key import new_api_key
from shared.clock import SystemClock
from shared.errors import Unavailable

SETTLE_S = 1.0
"""After an attack, before peace is measured: what it asked for ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """From `begin` to `end`, on the clock's time. `cpu` is what was used meanwhile, by kind of
    process."""

    begin: float
    end: float
    cpu: Mapping[str, CpuTimes]


@dataclass(slots=True)
class Attacked:
    """One attack's turns."""

    peace: list[Window] = field(default_factory=list)
    attack: list[Window] = field(default_factory=list)
    control: list[Window] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)


class Gaps(NamedTuple):
    """Between two tokens of a stream, ms."""

    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, streams: Streams, windows: Iterable[Window]) -> Gaps:
        gaps = [gap for window in windows for gap in streams.gaps_ms(window)]
        return cls(percentile(gaps, 50), percentile(gaps, 99), percentile(gaps, 100))


class Streams:
    """The other client: so many streams at a time, for ever. It keeps when tokens came."""

    def __init__(self, client: StreamClient, clock: SystemClock) -> None:
        self._client = client
        self._clock = clock
        self._records: list[StreamRecord] = []
        self.errors: Counter[str] = Counter()

    async def run(self, seed: int, prompt_tokens: int, max_tokens: int) -> None:
        for prompt in _endless_prompts(seed, prompt_tokens):
            record = await self._client.run(prompt, max_tokens, on_start=self._records.append)
            if record.error is not None:
                self.errors[record.error] += 1
                await asyncio.sleep(0.1)

    def gaps_ms(self, window: Window) -> list[float]:
        """Those of which any part was within it."""
        return [
            (later - earlier) * 1000
            for record in self._records
            for earlier, later in itertools.pairwise(record.arrivals)
            if window.begin <= later and earlier < window.end
        ]

    def first_ms(self, window: Window) -> list[float]:
        return [
            record.ttft_ms
            for record in self._records
            if window.begin <= record.sent_at < window.end and record.arrivals
        ]


def _endless_prompts(seed: int, num_tokens: int) -> itertools.chain[list[int]]:
    return itertools.chain.from_iterable(
        random_prompts(seed * 1_000_000 + n, 1, num_tokens) for n in itertools.count()
    )


class Hostile:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def attack(self, name: str) -> None:
        await self._ask(name)

    async def spend(self, share: float) -> None:
        """Computes on this share of a core."""
        await self._ask(f"{SPEND} {share:.3f}")

    async def rest(self) -> Counter[str]:
        """Returns the answers to the attack that ends by it."""
        return await self._ask("")

    async def _ask(self, line: str) -> Counter[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n".encode())
        async with asyncio.timeout(300):
            return Counter(json.loads(await self._process.stdout.readline()))


@asynccontextmanager
async def hostile_client(url: str, model: str, key: str) -> AsyncIterator[Hostile]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.hostile_client", url, model),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {VARIABLE: key},
    )
    try:
        yield Hostile(process)
    finally:
        process.kill()
        await process.wait()


async def watch(seconds: float, clock: SystemClock) -> Window:
    begin, before = clock.now(), await asyncio.to_thread(cpu_times)
    await asyncio.sleep(seconds)
    end, after = clock.now(), await asyncio.to_thread(cpu_times)
    return Window(begin=begin, end=end, cpu=difference(before, after))


async def measure(
    hostile: Hostile, names: list[str], options: argparse.Namespace
) -> dict[str, Attacked]:
    clock, rng = SystemClock(), random.Random(options.seed)
    found = {name: Attacked() for name in names}
    for number in range(options.rounds):
        for name in rng.sample(names, len(names)):
            turns = found[name]
            turns.peace.append(await watch(options.seconds, clock))
            await hostile.attack(name)
            attack = await watch(options.seconds, clock)
            turns.attack.append(attack)
            turns.answers += await hostile.rest()
            await asyncio.sleep(SETTLE_S)
            share = attack.cpu[HOSTILE].used_s / (attack.end - attack.begin)
            await hostile.spend(max(0.01, share))
            turns.control.append(await watch(options.seconds, clock))
            await hostile.rest()
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return found


def report(streams: Streams, found: dict[str, Attacked]) -> None:
    print(
        "| attack | peace p50 / p99, ms | attacked p50 / p99 / max | p99 × | of rounds | "
        "control p50 / p99 | p99 × of control | first token p50 × | answers |\n" + "|---" * 9 + "|"
    )
    for name, turns in found.items():
        peace, attacked, control = (
            Gaps.of(streams, windows) for windows in (turns.peace, turns.attack, turns.control)
        )
        ratios = [
            Gaps.of(streams, [a]).p99 / Gaps.of(streams, [p]).p99
            for p, a in zip(turns.peace, turns.attack, strict=True)
        ]
        first = [
            percentile([ms for w in windows for ms in streams.first_ms(w)], 50)
            for windows in (turns.peace, turns.attack)
        ]
        answers = ", ".join(f"{what}: {n}" for what, n in sorted(turns.answers.items()))
        print(
            f"| {name} | {peace.p50:.1f} / {peace.p99:.1f} | "
            f"{attacked.p50:.1f} / {attacked.p99:.1f} / {attacked.longest:.0f} | "
            f"{attacked.p99 / peace.p99:.2f} | "
            f"{min(ratios):.1f} … {statistics.median(ratios):.1f} … {max(ratios):.1f} | "
            f"{control.p50:.1f} / {control.p99:.1f} | {attacked.p99 / control.p99:.2f} | "
            f"{first[1] / first[0]:.1f} | {answers} |"
        )
    print("\nCPU: used / waited for, in cores")
    for name, turns in found.items():
        for kind in ("peace", "attack", "control"):
            print(f"{name}, {kind}: {_cores(getattr(turns, kind))}")
    if streams.errors:
        print(f"\nthe other client's errors: {dict(streams.errors)}")


def _cores(windows: list[Window]) -> str:
    seconds = sum(window.end - window.begin for window in windows)
    totals: dict[str, CpuTimes] = {}
    for window in windows:
        for kind, times in window.cpu.items():
            before = totals.get(kind, CpuTimes(0.0, 0.0))
            totals[kind] = CpuTimes(before.used_s + times.used_s, before.waited_s + times.waited_s)
    return ", ".join(
        f"{kind} {times.used_s / seconds:.2f} / {times.waited_s / seconds:.2f}"
        for kind, times in sorted(totals.items())
    )


async def run(options: argparse.Namespace, folder: Path) -> None:
    names = options.attack or [*ATTACKS, EVERYTHING]
    key, hostile_key, flags = "", "", [*options.up_flags]
    if options.keys:
        file, key, hostile_key = folder / "keys.toml", new_api_key(), new_api_key()
        add_entry(file, "other", key_entry("other", key))
        add_entry(file, "hostile", key_entry("hostile", hostile_key))
        flags += ["--api-key-file", str(file)]
    async with temporary_instance(
        ["--ranks", str(options.ranks), *flags],
        environment={VARIABLE: key} if key else {},
        keep_logs=options.keep_logs,
    ) as target:
        await _run_at(target, key, hostile_key, names, options)


async def _run_at(
    target: Target, key: str, hostile_key: str, names: list[str], options: argparse.Namespace
) -> None:
    if key:
        os.environ[VARIABLE] = key
    clock, url = SystemClock(), target.url
    if url is None:
        raise Unavailable("the instance has no gateway")
    async with stream_client(url, clock) as client:
        model = await served_name(client._http, url)
        async with hostile_client(url, model, hostile_key) as hostile:
            streams = Streams(client, clock)
            readers = [
                asyncio.create_task(streams.run(n, options.prompt_tokens, options.tokens))
                for n in range(options.streams)
            ]
            try:
                await asyncio.sleep(3.0)
                found = await measure(hostile, names, options)
            finally:
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)
    report(streams, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window")
    parser.add_argument("--streams", type=int, default=4, help="of the other client, at once")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="of each stream")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--attack", action="append", choices=[*ATTACKS, EVERYTHING])
    parser.add_argument("--keys", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-logs", type=Path)
    parser.add_argument("up_flags", nargs="*", help="of `starfish up`, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="starfish-hostile-") as folder:
        asyncio.run(run(options, Path(folder)))


if __name__ == "__main__":
    main()
