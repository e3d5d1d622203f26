"""When each command says that its change is done, or that somebody else has changed the plan."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cli.admin.answers import RankStatus, Status
from cli.admin.goals import drained, replaced, restarted, scaled, serving

DRAIN = {"after": "stay"}


def rank(number: int, **fields: Any) -> dict[str, Any]:
    live = {"rank": number, "state": "live", "node": "a", "in_map": True, "desired": True}
    return {**live, "safe_to_terminate": False, "drain": None, **fields}


def status(*ranks: dict[str, Any], steps: tuple[tuple[str, int, str], ...] = ()) -> Status:
    built = [{"kind": kind, "rank": number, "text": text} for kind, number, text in steps]
    change = {"number": 1, "in_progress": bool(steps), "steps": built}
    return msgspec.convert(
        {"ranks": ranks, "change": change, "verdicts_paused": False}, type=Status
    )


def is_two(found: RankStatus) -> bool:
    return found.rank == 2


DRAINING = rank(2, state="draining", drain=DRAIN)
GONE = {"state": "drained", "in_map": False}


def test_a_drain_waits_for_its_own_ranks_alone() -> None:
    goal = drained(is_two, "rank 2")
    steps = (("drain", 2, "two"), ("join", 3, "three"))
    assert goal(status(DRAINING, steps=steps)).waits_for == ("two",)
    done = goal(status(rank(2, drain=DRAIN, safe_to_terminate=True, **GONE), steps=(steps[1],)))
    assert (done.result, done.failed) == ("rank 2 is drained, and safe to terminate", False)
    assert goal(status(rank(2))).failed


def test_an_undrain_waits_until_the_rank_serves() -> None:
    goal = serving(is_two, "rank 2")
    away = rank(2, state="ready", in_map=False)
    assert goal(status(away, steps=(("join", 2, "loads"),))).waits_for == ("loads",)
    assert goal(status(rank(2))).result == "rank 2 serves"
    assert goal(status(rank(2, desired=False))).failed
    assert goal(status()).failed


@pytest.mark.parametrize(
    ("ranks", "steps", "waits_for"),
    [
        ([rank(0), rank(1, state="absent", in_map=False)], (("join", 1, "comes"),), ("comes",)),
        ([rank(0), rank(1, desired=False)], (("leave", 1, "goes"),), ("goes",)),
        (
            [rank(0), rank(1, desired=False, in_map=False)],
            (("leave", 1, "its process ends"),),
            ("its process ends",),
        ),
        ([rank(0), rank(1, drain=DRAIN, safe_to_terminate=True, **GONE)], (), ()),
        ([rank(0), rank(1)], (("restart", 1, "later"),), ()),
    ],
)
def test_scale_waits_for_ranks_that_come_and_go(
    ranks: list[dict[str, Any]], steps: Any, waits_for: tuple[str, ...]
) -> None:
    assert scaled(status(*ranks, steps=steps)).waits_for == waits_for


def test_replace_waits_until_the_rank_serves_there() -> None:
    goal = replaced(2, "b")
    assert goal(status(DRAINING, steps=(("leave", 2, "leaves"),))).waits_for == ("leaves",)
    assert goal(status(rank(2))).waits_for == ("the next map",)
    assert goal(status(rank(2, node="b"))).result == "rank 2 serves on b"
    assert goal(status(rank(2, desired=False))).failed


def test_a_restart_ends_when_nobody_waits_and_all_are_back() -> None:
    assert restarted(status(rank(0), steps=(("restart", 0, "r"),))).waits_for == ("r",)
    assert restarted(status(rank(0), steps=(("join", 0, "j"),))).waits_for == ("j",)
    assert not restarted(status(rank(0), steps=(("drain", 0, "d"),))).waits_for
