from __future__ import annotations

from dataclasses import replace

import pytest

from control_plane.cluster_state import ClusterState
from control_plane.desired_changes import (
    Change,
    DrainNode,
    DrainRanks,
    PauseVerdicts,
    Rebalance,
    Refusal,
    Replace,
    RestartRanks,
    ResumeVerdicts,
    Scale,
    Undrain,
    UndrainNode,
    change_desired,
)
from shared.desired_state import AfterDrain, DesiredState
from shared.types import NodeId, RankId
from tests.unit.control_plane.desired import agent, state_of
from tests.unit.control_plane.harness import spec

NOW = 1000.0


def ids(*ranks: int) -> tuple[RankId, ...]:
    return tuple(RankId(rank) for rank in ranks)


def changed(state: ClusterState, change: Change, request_id: str = "") -> ClusterState:
    result = change_desired(state, change, NOW, request_id=request_id)
    assert isinstance(result, DesiredState), result
    return replace(state, desired=result)


def refused(state: ClusterState, change: Change) -> str:
    result = change_desired(state, change, NOW)
    assert isinstance(result, Refusal)
    return result.text


def nodes(state: ClusterState) -> dict[int, str]:
    return {each.rank: each.node for each in state.desired.ranks}


def drains(state: ClusterState) -> dict[int, AfterDrain]:
    return {drain.rank: drain.after for drain in state.desired.drains}


def test_scale_up_places_new_ranks_where_there_is_most_room() -> None:
    state = changed(state_of(agent("a", 0, 1, 2), agent("b", 3)), Scale(num_ranks=7))
    assert nodes(state) == {0: "a", 1: "a", 2: "a", 3: "b", 4: "b", 5: "b", 6: "a"}
    assert state.desired.change == 1


def test_scale_up_honours_room_flags_and_the_wish_for_a_node() -> None:
    full = state_of(agent("a", 0, 1, ranks_max=2), agent("b", 2, 3, ranks_max=3))
    assert nodes(changed(full, Scale(num_ranks=5)))[4] == "b"
    assert "no node has room for rank 5" in refused(full, Scale(num_ranks=6))
    assert "no agent runs on node 'c'" in refused(full, Scale(num_ranks=5, node=NodeId("c")))
    leaving = state_of(agent("a", 0, 1, 2), agent("b", 3, leaving=True))
    assert nodes(changed(leaving, Scale(num_ranks=5)))[4] == "a"


def test_scale_up_by_number_on_a_named_node() -> None:
    state = state_of(agent("a", 0, 1, 2, ranks_max=4), agent("b", 3))
    by_number = Scale(num_ranks=6, coming=ids(9, 7), node=NodeId("b"))
    assert nodes(changed(state, by_number)) == {0: "a", 1: "a", 2: "a", 3: "b", 7: "b", 9: "b"}
    text = refused(state, Scale(num_ranks=5, coming=ids(3), node=NodeId("b")))
    assert "rank 3 exists already" in text
    assert "such as 4" in text
    text = refused(state, Scale(num_ranks=6, coming=ids(7, 9), node=NodeId("a")))
    assert "node 'a' has no room for rank 9" in text
    assert "agents run on a, b" in refused(state, Scale(num_ranks=5, node=NodeId("c")))
    on_cards = state_of(agent("a", 0, 1, 2, 3), exchange="ep")
    assert "room for 4 ranks, 0 to 3" in refused(on_cards, Scale(num_ranks=5, coming=ids(12)))


def test_cards_have_room_for_the_ranks_that_they_were_started_for() -> None:
    on_cards = state_of(agent("a", 0, 1, 2, 3), exchange="ep")
    assert "--ranks-max" in refused(on_cards, Scale(num_ranks=5))
    roomy = replace(on_cards, spec=replace(spec(), ranks_max=6))
    assert len(nodes(changed(roomy, Scale(num_ranks=6)))) == 6
    assert "room for 6 ranks" in refused(roomy, Scale(num_ranks=7))


def test_scale_down_drains_the_highest_or_the_named() -> None:
    state = state_of(agent("a", 0, 1), agent("b", 2, 3))
    down = changed(state, Scale(num_ranks=3, grace_s=5.0))
    assert drains(down) == {3: AfterDrain.LEAVE}
    assert sorted(nodes(down)) == [0, 1, 2]
    [drain] = down.desired.drains
    assert (drain.requested_at, drain.grace_s, drain.incarnation) == (NOW, 5.0, 1)
    assert drains(changed(state, Scale(num_ranks=3, leaving=ids(1)))) == {1: AfterDrain.LEAVE}
    assert "2 ranks are named" in refused(state, Scale(num_ranks=3, leaving=ids(0, 1)))
    assert "does not exist" in refused(state, Scale(num_ranks=3, leaving=ids(9)))


def test_what_cannot_hold_all_experts_is_refused_with_what_is_needed() -> None:
    state = state_of(agent("a", 0, 1, 2, 3), spec=spec(experts=6, slots=3))
    assert "at least one rank" in refused(state, Scale(num_ranks=0))
    text = refused(state, Scale(num_ranks=1))
    assert "3 slots in each layer for 6 experts; 1 more rank of 3 slots must serve" in text
    drained = changed(state, DrainRanks(ranks=ids(0, 1)))
    assert "1 more rank" in refused(drained, DrainRanks(ranks=ids(2)))
    assert "1 more rank" in refused(drained, Scale(num_ranks=3))
    assert "no other rank serves" in refused(state, DrainRanks(ranks=ids(0, 1, 2, 3)))
    assert "no other rank serves" in refused(
        state_of(agent("a", 0), spec=spec(ranks=1, experts=3)), DrainRanks(ranks=ids(0))
    )


def test_growing_again_keeps_the_ranks_that_were_about_to_leave() -> None:
    state = changed(state_of(agent("a", 0, 1), agent("b", 2, 3)), Scale(num_ranks=2))
    assert sorted(drains(state)) == [2, 3]
    again = changed(state, Scale(num_ranks=4))
    assert drains(again) == {}
    assert sorted(nodes(again)) == [0, 1, 2, 3]


def test_a_rank_that_was_about_to_leave_stays_where_it_runs_or_moves_by_leaving_there() -> None:
    agents = agent("a", 0, 1, ranks_max=2), agent("b", 2, 3, ranks_max=2), agent("c")
    state = changed(state_of(*agents), Scale(num_ranks=3))
    again = changed(state, Scale(num_ranks=4))
    assert (nodes(again)[3], drains(again)) == ("b", {})
    there = changed(state, Scale(num_ranks=4, node=NodeId("b")))
    assert (nodes(there)[3], drains(there)) == ("b", {})
    elsewhere = changed(state, Scale(num_ranks=4, node=NodeId("c")))
    assert (nodes(elsewhere)[3], drains(elsewhere)) == ("c", {3: AfterDrain.LEAVE})
    agents = agent("a", 0, 1), agent("b", 2, 3, leaving=True)
    ending = changed(changed(state_of(*agents), Scale(num_ranks=3)), Scale(num_ranks=4))
    assert (nodes(ending)[3], drains(ending)) == ("a", {3: AfterDrain.LEAVE})


def test_drain_and_undrain_of_ranks_and_nodes() -> None:
    state = state_of(agent("a", 0, 1), agent("b", 2, 3))
    drained = changed(state, DrainNode(node=NodeId("b")))
    assert drains(drained) == {2: AfterDrain.STAY, 3: AfterDrain.STAY}
    assert drained.desired.ranks == ()
    assert drains(changed(drained, Undrain(ranks=ids(2)))) == {3: AfterDrain.STAY}
    assert drains(changed(drained, UndrainNode(node=NodeId("b")))) == {}
    assert "no rank runs" in refused(state, DrainNode(node=NodeId("c")))
    assert "does not exist" in refused(state, DrainRanks(ranks=ids(8)))


def test_undrain_keeps_a_rank_that_was_about_to_leave_for_good() -> None:
    state = changed(state_of(agent("a", 0, 1), agent("b", 2, 3)), Scale(num_ranks=3))
    kept = changed(state, Undrain(ranks=ids(3)))
    assert nodes(kept)[3] == "b"
    assert drains(kept) == {}


def test_undrain_of_a_rank_that_leaves_a_full_node_or_runs_nowhere() -> None:
    state = state_of(agent("a", 0, 1), agent("b", 2, 3, ranks_max=2), agent("c", ranks_max=1))
    leaving = changed(state, Scale(num_ranks=3))
    assert nodes(changed(leaving, Undrain(ranks=ids(3))))[3] == "b"  # its place is its own
    gone = replace(leaving, records={m: r for m, r in leaving.records.items() if m.rank != 3})
    assert nodes(changed(gone, Undrain(ranks=ids(3))))[3] == "b"
    full = replace(gone, agents={node: a for node, a in gone.agents.items() if a.ranks_max == 2})
    moved_in = changed(full, Replace(rank=RankId(0), node=NodeId("b")))
    assert "no node has room for rank 3" in refused(moved_in, Undrain(ranks=ids(3)))


def test_a_drain_again_keeps_its_time_and_may_become_shorter() -> None:
    state = changed(state_of(agent("a", 0, 1, 2, 3)), DrainRanks(ranks=ids(1), grace_s=60.0))
    later = change_desired(state, DrainRanks(ranks=ids(1), grace_s=90.0), NOW + 9)
    assert later == state.desired
    shorter = change_desired(state, DrainRanks(ranks=ids(1), grace_s=1.0), NOW + 9)
    assert isinstance(shorter, DesiredState)
    assert (shorter.drains[0].grace_s, shorter.drains[0].requested_at) == (1.0, NOW + 9)


def test_replace_moves_a_rank_to_a_node_with_room() -> None:
    state = state_of(agent("a", 0, 1), agent("b", 2, 3), agent("c", ranks_max=1))
    moved = changed(state, Replace(rank=RankId(1), node=NodeId("c")))
    assert nodes(moved)[1] == "c"
    assert drains(moved) == {1: AfterDrain.LEAVE}
    assert "no room" in refused(moved, Replace(rank=RankId(2), node=NodeId("c")))
    assert "no agent" in refused(state, Replace(rank=RankId(1), node=NodeId("z")))
    back = changed(moved, Undrain(ranks=ids(1)))
    assert nodes(back)[1] == "a"
    assert drains(back) == {}
    full = state_of(agent("a", 0, 1, ranks_max=2), agent("b", 2, 3), agent("c", ranks_max=1))
    moved = changed(full, Replace(rank=RankId(1), node=NodeId("c")))
    taken = changed(moved, Replace(rank=RankId(2), node=NodeId("a")))
    assert "another rank has been given its place" in refused(taken, Undrain(ranks=ids(1)))
    assert nodes(changed(taken, Undrain(ranks=ids(2))))[2] == "b"
    drained = changed(taken, DrainRanks(ranks=ids(1)))
    assert drains(drained)[1] is AfterDrain.STAY
    moves = changed(drained, Undrain(ranks=ids(1)))
    assert nodes(moves)[1] == "c"
    assert drains(moves)[1] is AfterDrain.LEAVE
    same = changed(state, Replace(rank=RankId(1), node=NodeId("a")))
    assert drains(same) == {1: AfterDrain.RESTART}


def test_a_rolling_restart_names_all_ranks_unless_told() -> None:
    state = state_of(agent("a", 0, 1, 2, 3))
    restart = changed(state, RestartRanks(grace_s=4.0)).desired.restart
    assert restart is not None
    assert (restart.ranks, restart.requested_at, restart.grace_s) == (ids(0, 1, 2, 3), NOW, 4.0)
    down = changed(changed(state, RestartRanks()), Scale(num_ranks=3)).desired
    assert down.restart is not None
    assert down.restart.ranks == ids(0, 1, 2)
    tight = state_of(agent("a", 0, 1), spec=spec(ranks=2, experts=6, slots=3))
    assert "1 more rank" in refused(tight, RestartRanks())


@pytest.mark.parametrize("change", [PauseVerdicts(), ResumeVerdicts(), Rebalance()])
def test_switches(change: Change) -> None:
    state = state_of(agent("a", 0, 1, 2, 3), desired=DesiredState(verdicts_paused=True))
    desired = changed(state, change).desired
    assert desired.verdicts_paused is not isinstance(change, ResumeVerdicts)
    assert desired.rebalances == isinstance(change, Rebalance)


def test_a_request_id_is_obeyed_once() -> None:
    state = changed(state_of(agent("a", 0, 1, 2, 3)), Rebalance(), "r1")
    assert change_desired(state, Rebalance(), NOW, request_id="r1") == state.desired
    assert changed(state, Rebalance(), "r2").desired.rebalances == 2


def test_a_change_to_what_is_there_already_changes_nothing() -> None:
    state = state_of(agent("a", 0, 1, 2, 3))
    assert change_desired(state, Scale(num_ranks=4), NOW) == state.desired
    assert change_desired(state, ResumeVerdicts(), NOW) == state.desired
