"""What a node agent tells of its ranks' processes, and when: while they are suspected, and at once
if they are stopped or continued."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from node_agent.process_view import ProcessSample
from node_agent.rank_supervisor import RunningRank
from node_agent.view_reporter import AgentGaps, ViewReporter
from shared.clock import SystemClock
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import ProcessView, Suspicion, pack_record, unpack_record
from shared.store import Snapshot
from shared.types import (
    Accuser,
    Epoch,
    Incarnation,
    Member,
    ProcessState,
    RankId,
    Step,
    SuspicionReason,
)
from tests.support.memory_store import MemoryEtcd

KEYS = Keys("test")
MEMBER = Member(rank=RankId(2), incarnation=Incarnation(5))
RANK = RunningRank(member=MEMBER, lease_id=1, pid=os.getpid())


class Reports:
    """A reporter of one rank over an etcd in memory; `state` is what the kernel says."""

    def __init__(self) -> None:
        self.etcd = MemoryEtcd(SystemClock())
        self.store = self.etcd.client()
        self.leased = LeasedKeys(self.store, ttl_s=5.0)
        self.state = ProcessState.RUNNING
        self.num_samples = 0
        self.reporter = ViewReporter(
            store=self.store,
            keys=KEYS,
            clock=SystemClock(),
            leased=self.leased,
            alive=lambda: [RANK],
            sample=self._sample,
        )

    def _sample(self, pid: int) -> ProcessSample:
        assert pid == RANK.pid
        self.num_samples += 1
        return ProcessSample(
            is_stopped=self.state is ProcessState.STOPPED,
            is_runnable=False,
            cpu_ticks=0,
            run_ns=self.num_samples if self.state is ProcessState.RUNNING else 0,
            wait_ns=self.num_samples if self.state is ProcessState.STARVED else 0,
        )

    async def suspect(self, member: Member = MEMBER) -> None:
        suspicion = Suspicion(
            rank=member.rank,
            incarnation=member.incarnation,
            by="rank-0.1",
            reason=SuspicionReason.EXCHANGE,
            epoch=Epoch(1),
            step=Step(1),
            raised_at=0.0,
        )
        key = KEYS.suspicion(member.rank, member.incarnation, Accuser.RANK, "rank-0.1")
        await self.store.put(key, pack_record(suspicion))

    async def until(self, holds: Callable[[list[ProcessView]], bool]) -> None:
        """Waits until this holds of the views in etcd."""
        async with asyncio.timeout(30):
            async for _ in self.store.watch(KEYS.views):
                stored = (await self.store.get_prefix(KEYS.views)).values
                if holds([unpack_record(each.value, ProcessView) for each in stored]):
                    return

    async def next_view(self) -> ProcessView:
        async with asyncio.timeout(30):
            async for seen in self.store.watch(KEYS.views):
                values = seen.values if isinstance(seen, Snapshot) else (seen,)
                for each in values:
                    if each.value is not None:
                        return unpack_record(each.value, ProcessView)
        raise AssertionError("the watch ended")


@asynccontextmanager
async def reporting() -> AsyncIterator[Reports]:
    reports = Reports()
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(reports.leased.run()),
            tasks.create_task(reports.reporter.run()),
        ]
        yield reports
        for task in running:
            task.cancel()


@pytest.mark.parametrize("state", list(ProcessState))
async def test_a_suspected_process_is_looked_at(state: ProcessState) -> None:
    async with reporting() as reports:
        reports.state = state
        await reports.suspect()
        view = await reports.next_view()
        assert (view.member, view.state) == (MEMBER, state)


async def test_in_peace_nobody_is_sampled_and_a_stranger_never() -> None:
    async with reporting() as reports:
        await reports.suspect(Member(rank=RankId(2), incarnation=Incarnation(4)))
        await asyncio.sleep(0.1)
        assert reports.num_samples == 0


async def test_a_stop_and_its_end_are_told_at_once() -> None:
    async with reporting() as reports:
        reports.reporter.report_stopped(RANK, stopped=True)
        assert (await reports.next_view()).state is ProcessState.STOPPED
        reports.reporter.report_stopped(RANK, stopped=False)
        await reports.until(lambda views: [v.state for v in views] == [ProcessState.RUNNING])


async def test_the_view_of_a_process_that_is_gone_goes_too() -> None:
    async with reporting() as reports:
        reports.reporter.report_stopped(RANK, stopped=True)
        await reports.next_view()
        reports.reporter.forget(MEMBER)
        await reports.until(lambda views: views == [])


def test_own_gaps_are_what_is_beyond_a_tick_within_the_last_second() -> None:
    gaps = AgentGaps(now=10.0, tick_s=0.02)
    for number in range(1, 11):
        gaps.tick(10.0 + 0.02 * number)
    assert gaps.longest_ms(10.2) == pytest.approx(0.0, abs=1e-6)
    gaps.tick(10.72)
    assert gaps.longest_ms(10.72) == pytest.approx(500.0)
    for number in range(1, 60):
        gaps.tick(10.72 + 0.02 * number)
    assert gaps.longest_ms(11.9) == pytest.approx(0.0, abs=1e-6)


def test_a_gap_that_has_not_ended_counts() -> None:
    gaps = AgentGaps(now=10.0, tick_s=0.02)
    assert gaps.longest_ms(10.32) == pytest.approx(300.0)
