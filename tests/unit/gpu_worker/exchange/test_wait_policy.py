"""Whom a rank suspects of being late: the deadline follows its steps, and its own pauses accuse
nobody."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gpu_worker.exchange.step_deadline import UNKNOWN_MS
from gpu_worker.exchange.wait_policy import OWN_PAUSE_S, WaitPolicy
from shared.errors import StepAbandoned
from shared.types import Epoch, RankId, Step, SuspicionReason
from tests.support.fake_clock import FakeClock

PEER = RankId(3)
LOOK_S = 0.01


class Monitor:
    def __init__(self) -> None:
        self.newest = Epoch(1)
        self.suspected: list[RankId] = []

    def newest_epoch(self) -> Epoch:
        return self.newest

    def beat(self, waiting_for: Sequence[RankId]) -> None: ...

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None:
        self.suspected.append(rank)


class Waits:
    def __init__(self) -> None:
        self.clock, self.monitor = FakeClock(), Monitor()
        self.policy = WaitPolicy(self.monitor, self.clock, 40.0)
        self.step = 0

    def run_step(self, seconds: float) -> None:
        """A step whose only wait ends after so long."""
        self.begin()
        self.look(seconds)
        self.policy.end_wait()

    def begin(self) -> None:
        self.step += 1
        self.policy.begin_step(Epoch(1), Step(self.step))
        self.policy.begin_wait()

    def look(self, seconds: float) -> None:
        for _ in range(round(seconds / LOOK_S)):
            self.clock.advance(LOOK_S)
            self.policy.watch([PEER])


def test_steps_of_a_quarter_second_make_nobody_suspect() -> None:
    waits = Waits()
    for _ in range(5):
        waits.run_step(0.25)
    assert waits.monitor.suspected == []


def test_a_peer_that_is_late_beyond_all_steps_so_far_is_suspected_once() -> None:
    waits = Waits()
    waits.run_step(0.25)
    waits.begin()
    waits.look(0.74)
    assert waits.monitor.suspected == []
    waits.look(0.5)
    assert waits.monitor.suspected == [PEER]


def test_short_steps_have_the_configured_deadline() -> None:
    waits = Waits()
    for _ in range(3):
        waits.run_step(0.0)
    waits.begin()
    waits.look(0.05)
    assert waits.monitor.suspected == [PEER]


def test_before_the_first_step_there_is_time_for_what_nobody_knows() -> None:
    waits = Waits()
    waits.begin()
    waits.look(UNKNOWN_MS / 1000 - 0.02)
    assert waits.monitor.suspected == []
    waits.look(0.05)
    assert waits.monitor.suspected == [PEER]


def test_a_rank_that_was_paused_itself_accuses_nobody_for_it() -> None:
    waits = Waits()
    waits.run_step(0.0)
    waits.begin()
    waits.clock.advance(OWN_PAUSE_S + 1.0)
    waits.look(0.03)
    assert waits.monitor.suspected == []
    waits.look(0.03)
    assert waits.monitor.suspected == [PEER]


def test_a_step_that_was_thrown_away_teaches_nothing() -> None:
    waits = Waits()
    waits.run_step(0.0)
    waits.begin()
    waits.look(0.03)
    waits.policy.end_wait()
    waits.policy.begin_wait()
    waits.look(0.5)
    waits.monitor.newest = Epoch(2)
    with pytest.raises(StepAbandoned):
        waits.policy.watch([PEER])
    waits.monitor.newest, waits.monitor.suspected = Epoch(1), []
    waits.begin()
    waits.look(0.05)
    assert waits.monitor.suspected == [PEER]


def test_a_broken_link_to_a_peer_that_is_late_is_reported_as_well() -> None:
    waits = Waits()
    waits.run_step(0.0)
    waits.begin()
    waits.look(0.05)
    for _ in range(2):
        waits.policy.suspect(PEER, SuspicionReason.LINK, "a write failed")
    assert waits.monitor.suspected == [PEER, PEER]
