"""Why a rank does not come, and why another waits for its restart: in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.change_progress import Seen
from shared.desired_state import AfterDrain, DesiredRank, DesiredState, Drain, RollingRestart
from shared.records import AgentRecord, WaitingRank
from shared.types import NodeId, RankId
from tests.unit.control_plane.desired import agent, state_of
from tests.unit.control_plane.harness import spec

NOW = 1000.0


def ids(*ranks: int) -> tuple[RankId, ...]:
    return tuple(RankId(rank) for rank in ranks)


def texts(
    desired: DesiredState, *agents: AgentRecord, experts: int = 4, gone: int | None = None
) -> dict[int, str]:
    """Ranks 0 to 2 serve, with three slots each. `gone` has left the map, and has no process."""
    state = state_of(agent("a", 0, 1, 2), spec=replace(spec(ranks=3), num_experts=experts))
    expert_map = state.expert_map
    assert expert_map is not None
    seen = Seen(
        num_ranks=3,
        desired=desired,
        expert_map=replace(
            expert_map,
            num_experts=experts,
            members=tuple(member for member in expert_map.members if member.rank != gone),
        ),
        records={m: record for m, record in state.records.items() if m.rank != gone},
        verdicts=(),
        sessions_of=lambda member: 0,
        agents=agents,
    )
    return {step.rank: step.text for step in seen.steps(NOW)}


def waiting(record: AgentRecord, rank: int, until: float, why: str) -> AgentRecord:
    return replace(record, waiting=(WaitingRank(rank=RankId(rank), until=until, why=why),))


FOUR = DesiredState(
    ranks=tuple(DesiredRank(rank=r, node=NodeId("b" if r == 3 else "a")) for r in ids(0, 1, 2, 3))
)


@pytest.mark.parametrize(
    ("agents", "expected"),
    [
        ((agent("b"),), "has not registered yet (on b)"),
        ((agent("a", 0, 1, 2),), "no node agent runs on b; start one"),
        ((agent("b", leaving=True),), "the node agent on b was told to end"),
        ((waiting(agent("b"), 3, NOW + 8, "no memory"),), "starts again in 8 s on b: no memory"),
        ((waiting(agent("b"), 3, NOW - 1, "no memory"),), "starts again on b: no memory"),
    ],
)
def test_why_a_rank_that_shall_exist_is_not_there(
    agents: tuple[AgentRecord, ...], expected: str
) -> None:
    assert texts(FOUR, *agents)[3].endswith(expected)


@pytest.mark.parametrize(
    ("agents", "expected"),
    [
        ((), "has no process: no node agent runs on a; start one"),
        ((agent("a"),), "has not registered yet (on a)"),
        ((waiting(agent("a"), 2, NOW + 8, "no memory"),), "starts again in 8 s on a: no memory"),
    ],
)
def test_why_a_rank_that_is_restarted_does_not_come_back(
    agents: tuple[AgentRecord, ...], expected: str
) -> None:
    """Such as after SIGTERM to its agent, if nobody starts another one."""
    drained = replace(FOUR, drains=(Drain(rank=RankId(2), after=AfterDrain.RESTART),))
    assert texts(drained, *agents, gone=2)[2] == f"rank 2 {expected}"


def test_without_a_node_in_the_desired_state_the_agents_flags_count() -> None:
    absent = DesiredState(ranks=tuple(DesiredRank(rank=rank) for rank in ids(0, 1, 2, 3)))
    assert "no node agent runs with 3 in its --ranks" in texts(absent, agent("a", 0, 1, 2))[3]
    assert texts(absent, agent("a", 0, 1, 2, 3))[3].endswith("has not registered yet (on a)")


def test_ranks_wait_for_their_restart_one_after_the_other() -> None:
    restart = RollingRestart(ranks=ids(1, 2))
    found = texts(DesiredState(restart=restart))
    assert found[1] == "rank 1 waits for its restart: its turn is next, once no expert moves"
    assert found[2] == "rank 2 waits for its restart: after rank 1"
    begun = DesiredState(restart=restart, drains=(Drain(rank=RankId(1), after=AfterDrain.RESTART),))
    assert texts(begun)[2].endswith("after rank 1")
    assert texts(replace(FOUR, restart=restart), agent("b"))[1].endswith("after rank 3")


def test_a_restart_that_the_others_have_no_room_for_says_what_would_help() -> None:
    found = texts(DesiredState(restart=RollingRestart(ranks=ids(1))), experts=7)
    assert "the others have 6 slots in each layer for 7 experts; add a rank" in found[1]
