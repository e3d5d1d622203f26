"""`starfish bench fault`: what clients see when a rank dies under load, and where the time
goes."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from cli.bench.fault_observer import FaultObserver, FaultPhases
from cli.bench.loads import FaultLoad
from cli.bench.stats import Spread, percentile
from cli.bench.stream_client import (
    StreamClient,
    StreamRecord,
    random_prompts,
    run_all,
    stream_client,
)
from cli.run_dir import Target
from shared.clock import Clock
from shared.errors import ConfigError, Unavailable
from shared.rank_signal import send_to_rank
from shared.records import RankRecord

_RECOVERY_TIMEOUT_S = 90.0
_MISSES_PER_TRY_MAX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultResult:
    """One fault. Each stream contributes its longest gap that ended after the signal."""

    rank: int
    killed_at: float
    survivors_ms: tuple[float, ...]
    victims_ms: tuple[float, ...]
    unknown_ms: tuple[float, ...]  # the gateway did not say which rank served them
    wrong: int  # streams whose answer differs from the undisturbed run
    errors: tuple[str, ...]
    phases: FaultPhases | None

    @property
    def gaps_ms(self) -> tuple[float, ...]:
        return self.survivors_ms + self.victims_ms + self.unknown_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultReport:
    normal_itl_p99_ms: float
    tries: tuple[FaultResult, ...]

    @property
    def added_p99_ms(self) -> float:
        """The design's target: the gap minus the normal time between two tokens."""
        gaps = [gap for each in self.tries for gap in each.gaps_ms]
        return percentile(gaps, 99) - self.normal_itl_p99_ms

    @property
    def wrong(self) -> int:
        return sum(each.wrong for each in self.tries)


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRun:
    """The outcome of one fault, before its answers are checked."""

    rank: int
    killed_at: float
    prompts: Sequence[Sequence[int]]
    records: Sequence[StreamRecord]
    phases: FaultPhases | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRuns:
    """All faults of a run, before their answers are checked."""

    normal_itl_p99_ms: float
    faults: tuple[FaultRun, ...]


async def run_faults(target: Target, load: FaultLoad, clock: Clock, console: Console) -> FaultRuns:
    """No prompt is sent twice, so that no try finds the KV blocks of another. At the end every rank
    is in the map again. Raises Unavailable if the instance does not serve or does not recover."""
    rng = random.Random(load.seed)
    async with (
        stream_client(_url(target), clock) as client,
        FaultObserver.watching(target) as observer,
    ):
        await observer.wait_until_all_ranks_in_map(_RECOVERY_TIMEOUT_S)
        await run_all(client, fresh_prompts(rng, load)[:2], 8)
        records = await run_all(client, fresh_prompts(rng, load), load.new_tokens)
        _require_no_errors(records)
        normal = percentile([gap for record in records for gap in record.gaps_ms()], 99)
        console.print(f"undisturbed: {normal:.1f} ms between tokens at p99", highlight=False)
        faults: list[FaultRun] = []
        for _ in range(load.tries * _MISSES_PER_TRY_MAX):
            if len(faults) == load.tries:
                break
            await observer.wait_until_all_ranks_in_map(_RECOVERY_TIMEOUT_S)
            victim = rng.choice(observer.members())
            one = await _run_fault(client, observer, victim, rng, load, clock)
            if one is None:
                console.print(f"  rank {victim.member} had already exited; trying again")
                continue
            console.print(_summary_line(len(faults), load.tries, one), highlight=False)
            faults.append(one)
        await observer.wait_until_all_ranks_in_map(_RECOVERY_TIMEOUT_S)
    return FaultRuns(normal_itl_p99_ms=normal, faults=tuple(faults))


async def compare_answers(
    target: Target, fault_runs: FaultRuns, load: FaultLoad, clock: Clock
) -> FaultReport:
    """Compares with the answers of `target`, which nothing disturbs now. Best is a fresh instance
    without a cache; an instance that was disturbed at least computes the prompts again. Raises
    Unavailable."""
    tries = []
    async with stream_client(_url(target), clock) as client:
        for one in fault_runs.faults:
            answers = await run_all(client, one.prompts, load.new_tokens, bypass_cache=True)
            _require_no_errors(answers)
            tries.append(fault_result(one, answers))
    return FaultReport(normal_itl_p99_ms=fault_runs.normal_itl_p99_ms, tries=tuple(tries))


def _url(target: Target) -> str:
    """Raises Unavailable."""
    if target.url is None:
        raise Unavailable("which gateway? pass --url, or the --run-dir of `starfish up`")
    return target.url


def fresh_prompts(rng: random.Random, load: FaultLoad) -> list[list[int]]:
    return random_prompts(rng.getrandbits(64), load.streams, load.prompt_tokens)


class _Trigger:
    """Sends the signal once, as soon as the streams together have `at_tokens` tokens."""

    def __init__(
        self, victim: RankRecord, at_tokens: int, number: signal.Signals, clock: Clock
    ) -> None:
        self._victim, self._left, self._number, self._clock = victim, at_tokens, number, clock
        self.fired_at: float | None = None
        self.missed: str | None = None  # why the signal reached no process

    def __call__(self, num_tokens: int) -> None:
        self._left -= num_tokens
        if self._left <= 0 and self.fired_at is None:
            self.fired_at = self._clock.now()
            try:
                send_to_rank(self._victim, self._number)
            except ConfigError as error:  # it had already exited
                self.missed = str(error)


async def _run_fault(
    client: StreamClient,
    observer: FaultObserver,
    victim: RankRecord,
    rng: random.Random,
    load: FaultLoad,
    clock: Clock,
) -> FaultRun | None:
    """None if the victim exited before the signal."""
    prompts = fresh_prompts(rng, load)
    at_tokens = int(load.streams * load.new_tokens * rng.uniform(0.2, 0.6))
    trigger = _Trigger(victim, at_tokens, load.signal_number, clock)
    records = await run_all(client, prompts, load.new_tokens, trigger)
    if trigger.fired_at is None:
        raise Unavailable(f"the streams ended before the fault: {_errors(records)}")
    if trigger.missed is not None:
        return None
    killed_at = trigger.fired_at
    if load.signal_number is signal.SIGSTOP:  # it has its verdict; its agent restarts it
        with contextlib.suppress(ConfigError):
            send_to_rank(victim, signal.SIGKILL)
    hit = [r for r in records if r.rank == victim.rank]
    first = [at for r in hit if (at := r.first_after(killed_at)) is not None]
    phases = await observer.phases(victim.member, killed_at, max(first, default=None))
    return FaultRun(
        rank=victim.rank, killed_at=killed_at, prompts=prompts, records=records, phases=phases
    )


def fault_result(one: FaultRun, answers: Sequence[StreamRecord]) -> FaultResult:
    """`answers` are the undisturbed answers to the same prompts."""
    records, killed_at = one.records, one.killed_at
    return FaultResult(
        rank=one.rank,
        killed_at=killed_at,
        survivors_ms=_longest([r for r in records if r.rank not in (None, one.rank)], killed_at),
        victims_ms=_longest([r for r in records if r.rank == one.rank], killed_at),
        unknown_ms=_longest([r for r in records if r.rank is None], killed_at),
        wrong=sum(a.ids != b.ids for a, b in zip(records, answers, strict=True)),
        errors=_errors(records),
        phases=one.phases,
    )


def _longest(records: Sequence[StreamRecord], killed_at: float) -> tuple[float, ...]:
    """The longest gap of each stream that was still running at the fault."""
    gaps = [record.gaps_ms(since=killed_at) for record in records]
    return tuple(max(each) for each in gaps if each)


def _errors(records: Sequence[StreamRecord]) -> tuple[str, ...]:
    return tuple(record.error for record in records if record.error is not None)


def _require_no_errors(records: Sequence[StreamRecord]) -> None:
    errors = _errors(records)
    if errors:
        raise Unavailable(f"an undisturbed run failed: {errors[0]}")


def _summary_line(number: int, tries: int, one: FaultRun) -> str:
    longest = max(_longest(one.records, one.killed_at), default=float("nan"))
    again = "" if one.phases is None else f"; {one.phases.reprefill_tokens} tokens recomputed"
    errors = "".join(f"; {error}" for error in _errors(one.records)[:1])
    return f"  {number + 1}/{tries} rank {one.rank}: longest gap {longest:.0f} ms{again}{errors}"


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
    found = [t.phases for t in report.tries if t.phases is not None]
    console.print(_phase_table(found))
    if found:
        spread = Spread.of([float(each.reprefill_tokens) for each in found])
        console.print(
            "tokens of moved streams that were recomputed, per fault: "
            f"p50 {spread.p50:.0f}, max {spread.max:.0f}",
            highlight=False,
        )
    console.print(
        f"added by the fault at p99: {report.added_p99_ms:.0f} ms "
        f"(gap minus the normal {report.normal_itl_p99_ms:.1f} ms); "
        f"streams that differ from the undisturbed run: {report.wrong}",
        highlight=False,
    )


def _phase_table(found: Sequence[FaultPhases]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("where the time went, ms", "tries", "p50", "p99", "max"):
        table.add_column(name, justify="left" if name.startswith("where") else "right")
    for name in (n for n in FaultPhases.__dataclass_fields__ if n.endswith("_ms")):
        values = [v for each in found if (v := getattr(each, name)) is not None]
        if values:
            table.add_row(name.removesuffix("_ms"), str(len(values)), *Spread.of(values).cells())
    return table
