"""`starfish bench fault`: what clients see of a rank's death under load, and where the time
went."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from cli.bench.fault_witness import Phases, Witness
from cli.bench.stats import Spread, percentile
from cli.bench.stream_client import (
    StreamClient,
    StreamRecord,
    random_prompts,
    run_all,
    stream_client,
)
from cli.observe.kill import send_to_rank
from cli.run_dir import Target
from shared.clock import Clock
from shared.errors import ConfigError, Unavailable
from shared.records import RankRecord

_RECOVERY_TIMEOUT_S = 90.0
_MISSES_PER_TRY_MAX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultLoad:
    tries: int
    streams: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    number: signal.Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One fault. Gaps are each stream's longest that ended after the signal."""

    rank: int
    killed_at: float
    survivors_ms: tuple[float, ...]
    victims_ms: tuple[float, ...]
    unknown_ms: tuple[float, ...]  # the gateway did not say which rank served them
    wrong: int  # streams that ended otherwise than in the undisturbed run
    errors: tuple[str, ...]
    phases: Phases | None

    @property
    def gaps_ms(self) -> tuple[float, ...]:
        return self.survivors_ms + self.victims_ms + self.unknown_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultReport:
    normal_itl_p99_ms: float
    tries: tuple[Try, ...]

    @property
    def added_p99_ms(self) -> float:
        """The measure of the design: the gap less what is normal between two tokens."""
        gaps = [gap for each in self.tries for gap in each.gaps_ms]
        return percentile(gaps, 99) - self.normal_itl_p99_ms

    @property
    def wrong(self) -> int:
        return sum(each.wrong for each in self.tries)


async def bench_fault(
    target: Target, load: FaultLoad, clock: Clock, console: Console
) -> FaultReport:
    """Raises Unavailable where the instance does not serve, or does not recover."""
    if target.url is None:
        raise Unavailable("which gateway? pass --url, or the --run-dir of a `starfish up`")
    draw = random.Random(load.seed)
    prompts = random_prompts(load.seed, load.streams, load.prompt_tokens)
    async with (
        stream_client(target.url, clock) as client,
        Witness.watching(target) as witness,
    ):
        await witness.until_whole(_RECOVERY_TIMEOUT_S)
        await run_all(client, prompts[:2], 8)
        oracle = await run_all(client, prompts, load.new_tokens)
        _require_clean(oracle)
        normal = percentile([gap for record in oracle for gap in record.gaps_ms()], 99)
        console.print(f"undisturbed: {normal:.1f} ms between tokens at p99", highlight=False)
        tries: list[Try] = []
        for _ in range(load.tries * _MISSES_PER_TRY_MAX):
            if len(tries) == load.tries:
                break
            await witness.until_whole(_RECOVERY_TIMEOUT_S)
            victim = draw.choice(witness.members())
            at_tokens = int(load.streams * load.new_tokens * draw.uniform(0.2, 0.6))
            one = await _try(client, witness, prompts, oracle, victim, at_tokens, load, clock)
            if one is None:
                console.print(f"  rank {victim.member} had died by itself; trying again")
                continue
            console.print(_sentence(len(tries), load.tries, one), highlight=False)
            tries.append(one)
    return FaultReport(normal_itl_p99_ms=normal, tries=tuple(tries))


class _Trigger:
    """Sends the signal once, when the streams together have so many tokens."""

    def __init__(
        self, victim: RankRecord, at_tokens: int, number: signal.Signals, clock: Clock
    ) -> None:
        self._victim, self._left, self._number, self._clock = victim, at_tokens, number, clock
        self.fired_at: float | None = None
        self.missed: str | None = None  # why the signal reached nobody

    def __call__(self, num_tokens: int) -> None:
        self._left -= num_tokens
        if self._left <= 0 and self.fired_at is None:
            self.fired_at = self._clock.now()
            try:
                send_to_rank(self._victim, self._number)
            except ConfigError as error:  # it had died by itself
                self.missed = str(error)


async def _try(
    client: StreamClient,
    witness: Witness,
    prompts: Sequence[Sequence[int]],
    oracle: Sequence[StreamRecord],
    victim: RankRecord,
    at_tokens: int,
    load: FaultLoad,
    clock: Clock,
) -> Try | None:
    """None where the victim had gone before the signal."""
    trigger = _Trigger(victim, at_tokens, load.number, clock)
    records = await run_all(client, prompts, load.new_tokens, trigger)
    if trigger.fired_at is None:
        raise Unavailable(f"the streams ended before the fault: {_errors(records)}")
    if trigger.missed is not None:
        return None
    killed_at = trigger.fired_at
    if load.number is signal.SIGSTOP:  # it has been judged dead by now; let its agent have it
        with contextlib.suppress(ConfigError):
            send_to_rank(victim, signal.SIGKILL)
    hit = [r for r in records if r.rank == victim.rank]
    first = [at for r in hit if (at := r.first_after(killed_at)) is not None]
    phases = await witness.phases(victim.member, killed_at, max(first, default=None))
    return Try(
        rank=victim.rank,
        killed_at=killed_at,
        survivors_ms=_longest([r for r in records if r.rank not in (None, victim.rank)], killed_at),
        victims_ms=_longest(hit, killed_at),
        unknown_ms=_longest([r for r in records if r.rank is None], killed_at),
        wrong=sum(a.ids != b.ids for a, b in zip(records, oracle, strict=True)),
        errors=_errors(records),
        phases=phases,
    )


def _longest(records: Sequence[StreamRecord], killed_at: float) -> tuple[float, ...]:
    """Of streams that were still running at the fault."""
    gaps = [record.gaps_ms(since=killed_at) for record in records]
    return tuple(max(each) for each in gaps if each)


def _errors(records: Sequence[StreamRecord]) -> tuple[str, ...]:
    return tuple(record.error for record in records if record.error is not None)


def _require_clean(oracle: Sequence[StreamRecord]) -> None:
    errors = _errors(oracle)
    if errors:
        raise Unavailable(f"the undisturbed run failed already: {errors[0]}")


def _sentence(number: int, tries: int, one: Try) -> str:
    verdict = "" if one.wrong == 0 else f"; [red]{one.wrong} streams differ[/]"
    errors = f"; {one.errors[0]}" if one.errors else ""
    longest = max(one.gaps_ms, default=float("nan"))
    return f"  {number + 1}/{tries} rank {one.rank}: longest gap {longest:.0f} ms{verdict}{errors}"


def print_report(report: FaultReport, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("longest gap per stream, ms", "streams", "p50", "p99", "max"):
        table.add_column(name, justify="left" if name.startswith("longest") else "right")
    for name, gaps in (
        ("survivors' streams", [g for t in report.tries for g in t.survivors_ms]),
        ("victims' streams", [g for t in report.tries for g in t.victims_ms]),
        ("streams of unknown ranks", [g for t in report.tries for g in t.unknown_ms]),
    ):
        if gaps:
            spread = Spread.of(gaps)
            table.add_row(name, str(spread.count), *spread.cells())
    console.print(table)
    console.print(_phase_table([t.phases for t in report.tries if t.phases is not None]))
    console.print(
        f"added by the fault at p99: {report.added_p99_ms:.0f} ms "
        f"(gap less the normal {report.normal_itl_p99_ms:.1f} ms); "
        f"streams that differ from the undisturbed run: {report.wrong}",
        highlight=False,
    )


def _phase_table(found: Sequence[Phases]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("where the time went, ms", "tries", "p50", "p99", "max"):
        table.add_column(name, justify="left" if name.startswith("where") else "right")
    for name in Phases.__dataclass_fields__:
        values = [v for each in found if (v := getattr(each, name)) is not None]
        if values:
            table.add_row(name.removesuffix("_ms"), str(len(values)), *Spread.of(values).cells())
    return table
