"""One fault under a steady load: several ranks are hit at once, and the load goes on until they
have rejoined. Reports what clients saw of both. Part of `benchmarks.gpu_serve`."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu_serve_gaps import (
    Throughput,
    Window,
    errors,
    first_tokens_ms,
    had_begun,
    longest_gaps_ms,
    longest_pauses,
    ran_at,
)
from benchmarks.gpu_serve_load import SteadyLoad, Turn
from cli.bench.fault_observer import FaultObserver, FaultPhases
from cli.bench.stats import Spread, percentile
from shared.clock import Clock
from shared.errors import ConfigError, Unavailable
from shared.expert_map import ExpertMap
from shared.rank_signal import send_to_rank
from shared.records import RankRecord

_BEFORE_JOIN_S = 0.2
_WORST = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`paused_s`: how long after SIGSTOP the ranks get SIGCONT; 0: never."""

    number: signal.Signals
    num_ranks: int
    paused_s: float = 0.0

    def __str__(self) -> str:
        if self.paused_s:
            return f"PAUSE:{self.num_ranks}"
        return f"{self.number.name.removeprefix('SIG')}:{self.num_ranks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultTiming:
    """The load runs for `before_s` before a fault. Pauses that end later than `settle_s` after it,
    or begin later, are counted as those of rejoining."""

    before_s: float
    settle_s: float
    rejoin_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultResult:
    """One fault. Gaps are the longest of each stream that it interrupted; None if there was
    none."""

    fault: str
    struck_at: float  # `Clock.now()`
    victims: tuple[int, ...]
    gap_ms: Spread | None
    gap_on_victims_ms: Spread | None  # of streams that began on ranks that were struck
    gap_on_survivors_ms: Spread | None
    usual_gap_p99_ms: float  # between two tokens, before
    first_token_ms: Spread | None  # of streams that waited for it while the fault was new
    tokens_per_s_before: float
    tokens_per_s_after: float
    surviving_share: float
    recovered_ms: float | None  # until 95 % of the surviving share of the throughput before
    streams: int
    failed: tuple[str, ...]
    checked: int  # of streams that ran at the fault, or when a map came after it
    wrong: tuple[str, ...]  # of these
    epochs: tuple[str, ...]  # maps since, with the seconds from the fault
    worst: tuple[str, ...]  # of all pauses since
    phases: tuple[FaultPhases, ...]  # of the victims whose verdicts were seen
    rejoined_s: float | None
    in_place: tuple[int, ...]  # victims that rejoined as new incarnations of the same process
    rejoin_gap_ms: Spread | None
    rejoin_first_token_ms: Spread | None


async def inject_fault(
    load: SteadyLoad,
    observer: FaultObserver,
    fault: Fault,
    pace: FaultTiming,
    draw: random.Random,
    clock: Clock,
) -> tuple[FaultResult, list[Turn]]:
    """All ranks must be in the map. Also returns the streams whose tokens are to be compared with
    those of an undisturbed run. Raises Unavailable if a victim had died on its own."""
    await asyncio.sleep(pace.before_s)
    members = observer.members()
    victims = draw.sample(members, fault.num_ranks)
    struck_at = clock.now()
    _signal(victims, fault.number)
    if fault.paused_s:
        await asyncio.sleep(fault.paused_s)
        _signal(victims, signal.SIGCONT)
    await asyncio.sleep(pace.settle_s - fault.paused_s)
    first = [
        at
        for turn in _of_ranks(load.turns, victims)
        if (at := turn.record.first_after(struck_at)) is not None
    ]
    phases = [await observer.phases(v.member, struck_at, max(first, default=None)) for v in victims]
    rejoined_at = None
    with contextlib.suppress(Unavailable):
        await observer.wait_until_all_ranks_in_map(pace.rejoin_timeout_s)
        rejoined_at = clock.now()
    seen = _Seen(load=load, maps=tuple(observer.maps()), struck_at=struck_at, now=clock.now())
    struck = seen.report(
        fault=fault,
        victims=victims,
        num_members=len(members),
        pace=pace,
        phases=tuple(p for p in phases if p is not None),
        rejoined_at=rejoined_at,
        in_place=_in_place(victims, observer.members()),
    )
    return struck, seen.disturbed()


def _signal(victims: Sequence[RankRecord], number: signal.Signals) -> None:
    try:
        for victim in victims:
            send_to_rank(victim, number)
    except ConfigError as error:
        raise Unavailable(f"a rank had died by itself: {error}") from error


def _in_place(victims: Sequence[RankRecord], now: Sequence[RankRecord]) -> tuple[int, ...]:
    renewed = {(r.rank, r.node, r.pid): r.incarnation for r in now}
    return tuple(
        int(v.rank) for v in victims if renewed.get((v.rank, v.node, v.pid), 0) > v.incarnation
    )


def _of_ranks(turns: Sequence[Turn], ranks: Sequence[RankRecord]) -> list[Turn]:
    wanted = {record.rank for record in ranks}
    return [turn for turn in turns if turn.record.rank in wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    load: SteadyLoad
    maps: tuple[ExpertMap, ...]
    struck_at: float
    now: float

    def report(
        self,
        *,
        fault: Fault,
        victims: Sequence[RankRecord],
        num_members: int,
        pace: FaultTiming,
        phases: tuple[FaultPhases, ...],
        rejoined_at: float | None,
        in_place: tuple[int, ...],
    ) -> FaultResult:
        struck_at, now = self.struck_at, self.now
        before = Window(begin=struck_at - pace.before_s, end=struck_at)
        fresh = Window(begin=struck_at, end=struck_at + pace.settle_s)
        rejoining = Window(begin=fresh.end, end=now)
        turns = [t for t in self.load.turns if _ends_after(t, before.begin)]
        running = had_begun(turns, struck_at)
        on_victims = _of_ranks(running, victims)
        hit = {id(turn) for turn in on_victims}
        throughput = Throughput(self.load.arrivals)
        usual = throughput.tokens_per_s(before.begin, before.end)
        share = 1 - fault.num_ranks / num_members
        return FaultResult(
            fault=str(fault),
            struck_at=self.struck_at,
            victims=tuple(int(v.rank) for v in victims),
            gap_ms=_spread(longest_gaps_ms(running, fresh, now)),
            gap_on_victims_ms=_spread(longest_gaps_ms(on_victims, fresh, now)),
            gap_on_survivors_ms=_spread(
                longest_gaps_ms([t for t in running if id(t) not in hit], fresh, now)
            ),
            usual_gap_p99_ms=percentile(_usual_gaps_ms(turns, before), 99),
            first_token_ms=_spread(first_tokens_ms(turns, fresh, now)),
            tokens_per_s_before=usual,
            tokens_per_s_after=throughput.tokens_per_s(fresh.end - 1, self._joins_at(num_members)),
            surviving_share=share,
            recovered_ms=throughput.recovered_ms(fresh, usual * share, now),
            streams=len(turns),
            failed=tuple(errors(turns)),
            checked=0,
            wrong=(),
            epochs=tuple(
                f"{m.published_at - struck_at:.3f} s: epoch {m.epoch}, {len(m.members)} ranks"
                for m in self._maps_since()
            ),
            worst=self._worst(turns),
            phases=phases,
            rejoined_s=None if rejoined_at is None else rejoined_at - struck_at,
            in_place=in_place,
            rejoin_gap_ms=_spread(longest_gaps_ms(turns, rejoining, now)),
            rejoin_first_token_ms=_spread(first_tokens_ms(turns, rejoining, now)),
        )

    def disturbed(self) -> list[Turn]:
        moments = [self.struck_at, *(m.published_at for m in self._maps_since())]
        return ran_at(self.load.turns, moments, self.now)

    def _worst(self, turns: Sequence[Turn]) -> tuple[str, ...]:
        since = Window(begin=self.struck_at, end=self.now)
        pauses = sorted(longest_pauses(turns, since, self.now), reverse=True)
        return tuple(
            f"{p.begin - self.struck_at:.3f} s: {p.ms:.0f} ms, rank {p.rank}"
            for p in pauses[:_WORST]
        )

    def _maps_since(self) -> list[ExpertMap]:
        return [m for m in self.maps if m.published_at > self.struck_at]

    def _joins_at(self, num_members: int) -> float:
        """The time of the first map that has a rank more than the one before it, or now."""
        fewest = num_members
        for expert_map in self._maps_since():
            if len(expert_map.members) > fewest:
                return expert_map.published_at - _BEFORE_JOIN_S
            fewest = len(expert_map.members)
        return self.now


def _ends_after(turn: Turn, moment: float) -> bool:
    record = turn.record
    runs = record.finish is None and record.error is None
    return runs or max(record.arrivals, default=record.sent_at) >= moment


def _usual_gaps_ms(turns: Sequence[Turn], before: Window) -> list[float]:
    """Milliseconds of the pauses that ended before the fault."""
    return [
        (later - earlier) * 1e3
        for turn in turns
        for earlier, later in zip(turn.record.arrivals, turn.record.arrivals[1:], strict=False)
        if before.begin < earlier and later <= before.end
    ]


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None
