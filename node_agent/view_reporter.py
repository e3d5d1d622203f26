"""Tells the control plane what the kernel says of this node's ranks: at once if one is stopped or
continued, and again and again while anybody suspects one. It judges nothing.

It costs nothing without a fault: processes are sampled only while they are suspected. The node
agent's own gaps are measured all the time: a paused host cannot notice its pause while it lasts.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

import structlog

from node_agent.process_view import ProcessSample, classify, sample_process
from node_agent.rank_supervisor import RunningRank
from shared.changes import changes
from shared.clock import Clock
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import ProcessView, pack_record
from shared.store import Store
from shared.types import Accuser, Member, ProcessState

log = structlog.get_logger()

FIRST_SAMPLE_S = 0.01
SAMPLE_S = 0.05
STOPPED_REPEAT_S = 0.2
"""A verdict on a stopped process is only written if no view has come meanwhile."""
SUSPECTED_FOR_S = 3.0
"""A suspicion is looked into for this long. Whoever still suspects says so again."""
GAP_TICK_S = 0.02
GAP_SPAN_S = 1.0


class AgentGaps:
    """The longest time within the last second for which this process did not run."""

    def __init__(self, now: float, tick_s: float = GAP_TICK_S) -> None:
        self._tick_s = tick_s
        self._last_tick = now
        self._gaps: deque[tuple[float, float]] = deque()  # when it ended, and its length in s

    def tick(self, now: float) -> None:
        """Call it every `tick_s`."""
        self._gaps.append((now, now - self._last_tick - self._tick_s))
        self._last_tick = now
        while self._gaps[0][0] < now - GAP_SPAN_S:
            self._gaps.popleft()

    def longest_ms(self, now: float) -> float:
        gaps = [length_s for ended_at, length_s in self._gaps if ended_at >= now - GAP_SPAN_S]
        return max(0.0, 1000 * max([*gaps, now - self._last_tick - self._tick_s]))


@dataclass(slots=True)
class _Watched:
    running_rank: RunningRank
    until: float
    sample: ProcessSample | None = None
    stopped_told_at: float = -inf


class ViewReporter:
    """`run` never ends. `alive` returns the ranks whose processes run."""

    def __init__(
        self,
        *,
        store: Store,
        keys: Keys,
        clock: Clock,
        leased: LeasedKeys,
        alive: Callable[[], Iterable[RunningRank]],
        sample: Callable[[int], ProcessSample] = sample_process,
        gap_tick_s: float = GAP_TICK_S,
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._leased = leased
        self._alive = alive
        self._sample = sample
        self._gaps = AgentGaps(clock.now(), gap_tick_s)
        self._gap_tick_s = gap_tick_s
        self._watched: dict[Member, _Watched] = {}
        self._suspected = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_suspicions())
            tasks.create_task(self._measure_gaps())
            tasks.create_task(self._report_suspected())

    def report_stopped(self, running_rank: RunningRank, *, stopped: bool) -> None:
        """Its process was stopped by a signal, or goes on."""
        state = ProcessState.STOPPED if stopped else ProcessState.RUNNING
        if stopped:
            log.warning("rank_paused", member=str(running_rank.member), pid=running_rank.pid)
        else:
            log.info("rank_resumed", member=str(running_rank.member), pid=running_rank.pid)
        # A resumed process may be about to be judged.
        self._put(running_rank.member, state, before_others=not stopped)

    def forget(self, member: Member) -> None:
        """Its process is gone."""
        self._watched.pop(member, None)
        self._leased.delete(self._keys.view(member.rank, member.incarnation), urgent=False)

    async def _watch_suspicions(self) -> None:
        async for seen in changes(self._store, self._keys.suspicions):
            suspected_keys = [event.key for event in seen.events if event.value is not None]
            now = self._clock.now()
            for running_rank in self._alive():
                member = running_rank.member
                ids = member.rank, member.incarnation
                prefixes = tuple(self._keys.suspicions_of(*ids, accuser) for accuser in Accuser)
                if any(key.startswith(prefixes) for key in suspected_keys):
                    known = self._watched.setdefault(member, _Watched(running_rank, now))
                    known.until = now + SUSPECTED_FOR_S
                    self._suspected.set()

    async def _measure_gaps(self) -> None:
        while True:
            await asyncio.sleep(self._gap_tick_s)
            self._gaps.tick(self._clock.now())

    async def _report_suspected(self) -> None:
        while True:
            if not self._watched:
                self._suspected.clear()
                await self._suspected.wait()
            is_first = any(watched.sample is None for watched in self._watched.values())
            for member, watched in list(self._watched.items()):
                if watched.until < self._clock.now():
                    del self._watched[member]
                else:
                    self._look_at(watched)
            await asyncio.sleep(FIRST_SAMPLE_S if is_first else SAMPLE_S)

    def _look_at(self, watched: _Watched) -> None:
        before = watched.sample
        try:
            watched.sample = self._sample(watched.running_rank.pid)
        except OSError:
            return  # it is gone: the exit report says so
        if before is None:
            return
        state, now = classify(before, watched.sample), self._clock.now()
        if state is ProcessState.STOPPED:
            if now - watched.stopped_told_at < STOPPED_REPEAT_S:
                return
            watched.stopped_told_at = now
        self._put(watched.running_rank.member, state)

    def _put(self, member: Member, state: ProcessState, *, before_others: bool = False) -> None:
        now = self._clock.now()
        view = ProcessView(
            rank=member.rank,
            incarnation=member.incarnation,
            state=state,
            host_gap_ms=round(self._gaps.longest_ms(now), 1),
        )
        self._leased.put(
            self._keys.view(member.rank, member.incarnation),
            pack_record(view),
            before_others=before_others,
        )
