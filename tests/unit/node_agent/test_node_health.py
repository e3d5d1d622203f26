"""Whether a node's ranks serve, as its agent says it."""

from __future__ import annotations

import pytest

from node_agent.node_health import node_report
from shared.types import Incarnation, Member, RankId

RANKS = (RankId(8), RankId(9))


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def test_a_node_is_ready_if_the_map_has_all_of_its_ranks() -> None:
    members = [member(0), member(8), member(9)]
    assert node_report(RANKS, [member(8), member(9)], members) == {
        "status": "ready",
        "live": True,
        "ranks": {"8": "serving", "9": "serving"},
        "reasons": [],
    }


@pytest.mark.parametrize(
    ("alive", "members", "state"),
    [
        ([member(8)], [member(8), member(9)], "down"),  # the map does not know of the death yet
        ([member(8), member(9)], [member(8)], "joining"),
        ([member(8), member(9, 2)], [member(8), member(9, 1)], "joining"),
    ],
)
def test_a_rank_that_does_not_serve_is_named(
    alive: list[Member], members: list[Member], state: str
) -> None:
    report = node_report(RANKS, alive, members)
    assert report["status"] == "not_ready"
    assert report["ranks"] == {"8": "serving", "9": state}
    assert report["reasons"] == [f"rank 9 is {state}"]


def test_a_rank_that_shall_not_serve_is_drained_and_joins_nothing() -> None:
    report = node_report(RANKS, [member(8), member(9, 2)], [member(8)], drains=[RankId(9)])
    assert report["reasons"] == ["rank 9 is drained"]
    both = [member(8), member(9)]  # it serves until it has left the map
    assert node_report(RANKS, both, both, drains=[RankId(9)])["status"] == "ready"
    assert node_report(RANKS, [member(8)], [member(8)], drains=[RankId(9)])["reasons"] == [
        "rank 9 is down"
    ]


def test_without_a_map_nothing_serves() -> None:
    report = node_report(RANKS, [member(8), member(9)], None)
    assert report["reasons"] == ["no expert map is published yet"]
