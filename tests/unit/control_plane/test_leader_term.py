"""A verdict on a stopped process, which goes on before or after it is written."""

from __future__ import annotations

import pytest

from control_plane.judgements import VerdictCancelled
from control_plane.writes import PublishMap
from shared.errors import TxnConflict
from shared.records import ProcessView, pack_record
from shared.store import Put
from shared.types import ProcessState
from tests.unit.control_plane.harness import ControlPlaneHarness

LOOK_S = 0.02


class StoppedRank:
    """An instance of four ranks; the process of rank 1 stops."""

    def __init__(self) -> None:
        self.harness = ControlPlaneHarness()
        for rank in range(4):
            self.harness.start(rank)
        self.harness.settle()
        self.rank = self.harness.ranks[1]
        self.rank.answering = False
        self.say(ProcessState.STOPPED)

    def say(self, state: ProcessState) -> None:
        """Its node agent."""
        rank, incarnation = self.rank.member.rank, self.rank.member.incarnation
        view = ProcessView(rank=rank, incarnation=incarnation, state=state)
        key = self.harness.keys.view(rank, incarnation)
        self.harness.etcd.apply([Put(key=key, value=pack_record(view))])

    def go_on(self) -> None:
        self.rank.answering = True
        self.say(ProcessState.RUNNING)

    def verdict(self) -> PublishMap:
        """The map without it, which is not written yet."""
        for _ in range(50):
            self.harness.clock.advance(LOOK_S)
            decision = self.harness.next_decision()
            if isinstance(decision, PublishMap):
                assert [v.member for v in decision.verdicts] == [self.rank.member]
                return decision
        raise AssertionError("it was never judged")

    def is_member(self) -> bool:
        expert_map = self.harness.expert_map
        return expert_map is not None and expert_map.has(self.rank.member)


@pytest.fixture
def stopped() -> StoppedRank:
    return StoppedRank()


async def test_one_that_stays_stopped_is_left_out(stopped: StoppedRank) -> None:
    await stopped.harness.publish(stopped.verdict())
    assert not stopped.is_member()


async def test_a_verdict_that_comes_after_it_goes_on_is_not_written(stopped: StoppedRank) -> None:
    verdict = stopped.verdict()
    stopped.go_on()  # etcd knows it, and the leader does not
    with pytest.raises(TxnConflict):
        await stopped.harness.publish(verdict)
    stopped.harness.reread()
    assert stopped.harness.leader_term.membership.dead == frozenset()
    cancelled = VerdictCancelled(member=stopped.rank.member)
    assert cancelled in stopped.harness.leader_term.take_judgements()
    stopped.harness.pass_time(5.0)
    assert stopped.is_member()


def test_one_that_goes_on_while_the_leader_decides_lives(stopped: StoppedRank) -> None:
    stopped.verdict()
    stopped.go_on()
    stopped.harness.pass_time(5.0)
    assert stopped.is_member()


async def test_one_that_was_spared_is_judged_when_it_stops_again(stopped: StoppedRank) -> None:
    stopped.verdict()
    stopped.go_on()
    stopped.harness.pass_time(1.0)
    stopped.rank.answering = False
    stopped.say(ProcessState.STOPPED)
    await stopped.harness.publish(stopped.verdict())
    assert not stopped.is_member()


async def test_a_verdict_that_was_written_stands(stopped: StoppedRank) -> None:
    await stopped.harness.publish(stopped.verdict())
    stopped.go_on()
    stopped.harness.reread()
    stopped.harness.pass_time(1.0)
    assert not stopped.is_member()
    assert stopped.rank.member in stopped.harness.leader_term.membership.dead | set(
        stopped.harness.cluster.state.verdicts
    )


async def test_a_new_leader_believes_an_old_view_only_when_it_is_told_again(
    stopped: StoppedRank,
) -> None:
    """It may be left over from an agent that is gone."""
    stopped.harness.begin_term()
    for _ in range(25):
        stopped.harness.clock.advance(LOOK_S)
        assert stopped.harness.next_decision() is None
    assert stopped.rank.member in stopped.harness.leader_term.detector.suspected
    stopped.say(ProcessState.STOPPED)
    await stopped.harness.publish(stopped.verdict())
    assert not stopped.is_member()
