"""Changes on purpose, in a small instance: who leaves the map and when, that every expert has a
replica elsewhere first, and that what was asked is done in the end, whoever leads."""

from __future__ import annotations

import pytest

from control_plane.desired_changes import (
    DrainRanks,
    PauseVerdicts,
    Rebalance,
    Replace,
    RestartRanks,
    ResumeVerdicts,
    Scale,
    Undrain,
)
from control_plane.residency import Residency
from control_plane.writes import PublishMap
from shared.desired_state import AfterDrain, DesiredState
from shared.records import AgentRecord, Verdict, pack_record
from shared.store import Put
from shared.types import Incarnation, Member, NodeId, RankId, SuspicionReason
from shared.wire import LatePeer
from tests.unit.control_plane.harness import ControlPlaneHarness, spec


def ids(*ranks: int) -> tuple[RankId, ...]:
    return tuple(RankId(rank) for rank in ranks)


def serving(*, ranks: int = 4, slots: int = 3, redundant: int = 6) -> ControlPlaneHarness:
    harness = ControlPlaneHarness(spec(ranks=ranks, slots=slots, redundant=redundant))
    for rank in range(ranks):
        harness.start(rank)
    harness.settle()
    assert members(harness) == list(range(ranks))
    return harness


def members(harness: ControlPlaneHarness) -> list[int]:
    assert harness.expert_map is not None
    return [m.rank for m in harness.expert_map.members]


def desired(harness: ControlPlaneHarness) -> DesiredState:
    return harness.cluster.state.desired


def verdicts(harness: ControlPlaneHarness) -> list[Verdict]:
    return [v for w in harness.writes if isinstance(w, PublishMap) for v in w.verdicts]


def put_agent(harness: ControlPlaneHarness, node: str, *ranks: int, leaving: bool = False) -> None:
    record = AgentRecord(node=NodeId(node), pid=1, ranks=ids(*ranks), leaving=leaving)
    harness.etcd.apply([Put(key=harness.keys.agent(record.node), value=pack_record(record))])


def test_a_drained_rank_leaves_once_it_serves_nobody() -> None:
    harness = serving()
    harness.ranks[1].sessions = 3
    harness.ask(DrainRanks(ranks=ids(1), grace_s=60.0))
    harness.settle(4.0)
    assert members(harness) == [0, 1, 2, 3]
    harness.ranks[1].sessions = 0
    harness.settle(2.0)
    assert members(harness) == [0, 2, 3]
    [verdict] = verdicts(harness)
    assert (verdict.cause, verdict.signals) == (SuspicionReason.DRAINED, ())
    harness.rejoin(1)
    harness.settle()
    assert members(harness) == [0, 2, 3], "a drained rank stays outside"
    harness.ask(Undrain(ranks=ids(1)))
    harness.settle()
    assert members(harness) == [0, 1, 2, 3]
    assert len(verdicts(harness)) == 1


def test_gateways_have_time_to_hear_of_a_drain() -> None:
    harness = serving()
    harness.ask(DrainRanks(ranks=ids(1)))
    harness.pass_time(0.5)
    assert members(harness) == [0, 1, 2, 3]
    harness.pass_time(1.0)
    assert members(harness) == [0, 2, 3]


def test_sessions_that_nobody_moves_keep_a_rank_for_a_time_only() -> None:
    harness = serving()
    harness.ranks[1].sessions = 1
    harness.ask(DrainRanks(ranks=ids(1), grace_s=5.0))
    harness.pass_time(30.0, tick_s=0.5)
    assert members(harness) == [0, 1, 2, 3]
    harness.pass_time(7.0, tick_s=0.5)
    assert members(harness) == [0, 2, 3]


def test_what_only_the_leaver_holds_is_loaded_elsewhere_first() -> None:
    harness = serving(redundant=0)
    harness.ask(DrainRanks(ranks=ids(1)))
    harness.pass_time(3.0)
    assert members(harness) == [0, 1, 2, 3], "the others hold too little, and load nothing here"
    harness.settle(3.0)
    assert members(harness) == [0, 2, 3]


def test_surplus_replicas_give_way_in_a_map_before_they_are_overwritten() -> None:
    harness = serving(slots=2, redundant=2)
    assert harness.expert_map is not None
    for rank in (0, 1):
        held = harness.expert_map.placement[:, rank]
        others = [r for r in range(4) if r != rank]
        if set(held.ravel()) - set(harness.expert_map.placement[:, others].ravel()):
            break
    harness.ask(DrainRanks(ranks=ids(rank)))
    harness.settle()
    assert rank not in members(harness)  # `ControlPlaneHarness` has checked every map


def test_a_drain_waits_while_the_others_cannot_hold_all() -> None:
    harness = serving()
    harness.ask(DrainRanks(ranks=ids(1, 2)))
    harness.kill(3)
    harness.settle()
    assert len(members(harness)) == 2, "one of them may go"
    harness.start(3)
    harness.settle()
    assert members(harness) == [0, 3]


@pytest.mark.parametrize("seconds", [0.1, 0.6, 1.2, 2.0])
def test_a_new_leader_goes_on_with_it(seconds: float) -> None:
    harness = serving()
    harness.ask(DrainRanks(ranks=ids(1)))
    harness.pass_time(seconds)
    harness.begin_term()
    harness.settle(4.0)
    assert members(harness) == [0, 2, 3]
    assert [v.cause for v in verdicts(harness)] == [SuspicionReason.DRAINED]


def test_scale_up_and_down() -> None:
    harness = serving()
    put_agent(harness, "n0", 0, 2)
    put_agent(harness, "n1", 1, 3)
    harness.ask(Scale(num_ranks=6))
    nodes = {each.rank: each.node for each in desired(harness).ranks}
    for rank in (4, 5):
        harness.start(rank).write_record(node=nodes[RankId(rank)])
    harness.settle()
    assert members(harness) == [0, 1, 2, 3, 4, 5]
    harness.ask(Scale(num_ranks=3))
    harness.settle(4.0)
    assert members(harness) == [0, 1, 2]
    assert [d.after for d in desired(harness).drains] == [AfterDrain.LEAVE] * 3
    for rank in (3, 4, 5):
        harness.rejoin(rank)
    harness.settle()
    assert members(harness) == [0, 1, 2], "they are not wanted"
    for rank in (3, 4, 5):
        harness.kill(rank)
    harness.settle()
    assert desired(harness).drains == ()
    assert members(harness) == [0, 1, 2]


def test_ranks_that_nobody_wants_do_not_join() -> None:
    harness = serving()
    harness.start(4)
    harness.settle()
    assert members(harness) == [0, 1, 2, 3]


def test_replace_waits_for_the_rank_on_its_new_node() -> None:
    harness = serving()
    put_agent(harness, "n2")
    harness.ask(Replace(rank=RankId(1), node=NodeId("n2")))
    harness.settle(4.0)
    assert members(harness) == [0, 2, 3]
    harness.rejoin(1)
    harness.settle()
    assert members(harness) == [0, 2, 3], "it is still on its old node"
    harness.kill(1)
    harness.settle(1.0)
    assert len(desired(harness).drains) == 1, "it has not come back"
    harness.start(1).write_record(node=NodeId("n2"))
    harness.settle()
    assert members(harness) == [0, 1, 2, 3]
    assert desired(harness).drains == ()


def test_a_rolling_restart_takes_one_rank_after_the_other() -> None:
    harness = serving()
    harness.ask(RestartRanks())
    for rank in range(4):
        harness.settle(8.0)
        assert members(harness) == [r for r in range(4) if r != rank]
        harness.begin_term()
        rejoined = harness.rejoin(rank)
        harness.settle(3.0)
        assert members(harness) == [r for r in range(4) if r != rank], "the same process"
        harness.kill(rank)
        assert rejoined.member not in harness.cluster.state.verdicts
        harness.start(rank)
    harness.settle()
    assert members(harness) == [0, 1, 2, 3]
    assert desired(harness).restart is None
    assert desired(harness).drains == ()
    assert {v.cause for v in verdicts(harness)} == {SuspicionReason.DRAINED}


def test_a_restart_that_a_smaller_instance_cannot_do_waits_until_it_has_grown() -> None:
    harness = serving(slots=2, redundant=2)
    put_agent(harness, "node-0", 0, 1, 2, 3)
    harness.ask(RestartRanks(ranks=ids(1)))
    harness.ask(Scale(num_ranks=3, leaving=ids(3)))
    harness.settle()
    harness.etcd.revoke(harness.ranks.pop(3).lease_id)
    harness.settle(12.0)
    assert members(harness) == [0, 1, 2]
    assert desired(harness).restart is not None
    harness.ask(Scale(num_ranks=4))
    harness.start(3)
    harness.settle(12.0)
    assert members(harness) == [0, 2, 3], "its turn has come"


def test_a_rank_that_was_told_to_end_is_drained_and_comes_back_as_a_new_process() -> None:
    harness = serving()
    harness.ranks[2].write_record(leaving=True)
    harness.settle(3.0)
    assert members(harness) == [0, 1, 3]
    harness.etcd.revoke(harness.ranks.pop(2).lease_id)
    harness.start(2)
    harness.settle()
    assert members(harness) == [0, 1, 2, 3]
    assert desired(harness).drains == ()


def test_a_node_that_is_told_to_end_takes_its_ranks_along_if_the_others_suffice() -> None:
    harness = serving()
    put_agent(harness, "n1", 1, 3, leaving=True)
    harness.settle(3.0)
    assert members(harness) == [0, 2]
    put_agent(harness, "n0", 0, 2, leaving=True)
    harness.settle(3.0)
    assert members(harness) == [0, 2], "nobody else could serve"


def test_no_verdict_while_verdicts_are_paused_but_on_the_exited() -> None:
    harness = serving()
    harness.ask(PauseVerdicts())
    harness.hang(1)
    harness.pass_time(3.0)
    assert members(harness) == [0, 1, 2, 3]
    harness.ask(ResumeVerdicts())
    harness.pass_time(1.0)
    assert members(harness) == [0, 2, 3]


def test_a_successor_ends_its_predecessor_though_verdicts_are_paused() -> None:
    harness = serving()
    harness.ask(PauseVerdicts())
    old = harness.ranks.pop(1)
    harness.start(1)
    harness.settle()
    assert members(harness) == [0, 1, 2, 3]
    assert [v.member for v in verdicts(harness)] == [old.member]


def test_a_rebalance_does_not_wait_for_quiet() -> None:
    harness = serving()
    harness.kill(1)
    harness.start(1)
    harness.plans.clear()
    harness.settle(0.4)
    assert members(harness) == [0, 1, 2, 3]
    harness.pass_time(0.2)
    assert not harness.plans
    harness.ask(Rebalance())
    harness.pass_time(0.2)
    assert harness.plans


def test_an_outage_forms_a_map_without_the_drained() -> None:
    harness = serving()
    harness.ask(DrainRanks(ranks=ids(3)))
    harness.settle(3.0)
    harness.rejoin(3)
    for rank in (0, 1, 2):
        harness.kill(rank)
        harness.start(rank)
    harness.settle()
    assert members(harness) == [0, 1, 2]


def test_verdicts_on_leavers_name_the_map_that_leaves_them_out() -> None:
    harness = serving()
    harness.ask(DrainRanks(ranks=ids(1, 2)))
    harness.settle(3.0)
    assert members(harness) == [0, 3]
    assert {v.epoch for v in verdicts(harness)} == {harness.published[-1].epoch}
    member = Member(rank=RankId(1), incarnation=Incarnation(1))
    assert member in harness.cluster.state.verdicts


def test_below_capacity_an_instance_can_be_made_larger() -> None:
    harness = ControlPlaneHarness(spec(ranks=4, experts=6, slots=2, redundant=2))
    for rank in range(4):
        harness.start(rank).write_record(computes_on_demand=True)
    harness.settle()
    for rank in (0, 1):
        harness.kill(rank)
        harness.settle()
    below = harness.expert_map
    assert below is not None
    assert below.on_demand.size
    put_agent(harness, "n4")
    harness.ask(Scale(num_ranks=5))
    wider = Residency(harness.cluster.state, harness.spec).expert_map
    assert wider is not None
    assert wider.computed.shape[1] == 5
    assert wider.uncovered() == []
    harness.settle()
    harness.start(4).write_record(computes_on_demand=True)
    harness.link()
    harness.settle()
    found = harness.expert_map
    assert found is not None
    assert [m.rank for m in found.members] == [2, 3, 4]
    assert found.on_demand.size == 0
    assert found.uncovered() == []


def step_with(harness: ControlPlaneHarness, *slow: int) -> None:
    """The others wait 80 of the 100 ms of a step for these ranks."""
    for rank in harness.ranks.values():
        rank.step_ms = 100.0
        rank.late_peers = tuple(LatePeer(rank=RankId(each), ms=80.0) for each in slow)


def test_a_rank_that_holds_the_others_up_for_long_is_drained_and_stays_out() -> None:
    harness = serving()
    step_with(harness, 2)
    harness.settle(3.0)
    assert desired(harness).drains == (), "not yet"
    harness.settle(4.0)
    [drain] = desired(harness).drains
    assert (drain.rank, drain.after) == (2, AfterDrain.STAY)
    assert members(harness) == [0, 1, 3]
    harness.rejoin(2)
    step_with(harness)
    harness.settle()
    assert members(harness) == [0, 1, 3]
    harness.ask(Undrain(ranks=ids(2)))
    harness.settle()
    assert members(harness) == [0, 1, 2, 3], "nobody is slow any more"


def test_a_rank_that_was_slow_for_a_moment_now_and_then_stays() -> None:
    harness = serving()
    for _ in range(5):
        step_with(harness, 2)
        harness.settle(2.0)
        step_with(harness)
        harness.settle(2.4)
    assert desired(harness).drains == ()


def test_an_average_that_no_step_renews_says_nothing() -> None:
    harness = serving()
    step_with(harness, 2)
    harness.settle(1.0)
    harness.stops_stepping = True
    harness.settle(10.0)
    assert desired(harness).drains == ()


def test_half_of_the_ranks_stay_however_slow_they_are() -> None:
    harness = serving(ranks=8)
    for slow in ((0,), (0, 1), (0, 1, 2), (3,), (4,), (5,)):
        step_with(harness, *slow)
        harness.settle(12.0)
    assert len(desired(harness).drains) == 4
    assert len(members(harness)) == 4


def test_whom_the_others_cannot_replace_stays_though_slow() -> None:
    harness = serving(ranks=3, slots=2, redundant=0)
    step_with(harness, 2)
    harness.settle(12.0)
    assert (desired(harness).drains, members(harness)) == ((), [0, 1, 2])


def test_while_verdicts_are_paused_nobody_is_taken_out_for_being_slow() -> None:
    harness = serving()
    harness.ask(PauseVerdicts())
    step_with(harness, 2)
    harness.settle(12.0)
    assert desired(harness).drains == ()
    harness.ask(ResumeVerdicts())
    harness.settle(2.0)
    assert [drain.rank for drain in desired(harness).drains] == [2]
