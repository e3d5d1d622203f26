"""When each command says that its change is done, or that somebody else has changed the plan."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cli.admin.answers import Accepted, RankStatus, Status
from cli.admin.goals import (
    Asked,
    Goal,
    Progress,
    drained,
    rebalanced,
    replaced,
    restart_stopped,
    restarted,
    scaled,
    serving,
    verdicts,
)

DRAIN, RESTART, LEAVE = {"after": "stay"}, {"after": "restart"}, {"after": "leave"}


def rank(number: int, **fields: Any) -> dict[str, Any]:
    live = {"rank": number, "state": "live", "node": "a", "in_map": True, "desired": True}
    return {**live, "safe_to_terminate": False, "drain": None, "process": 1, **fields}


def status(
    *ranks: dict[str, Any],
    steps: tuple[tuple[str, int, str], ...] = (),
    restart: tuple[int, ...] = (),
    **fields: Any,
) -> Status:
    built = [{"kind": kind, "rank": number, "text": text} for kind, number, text in steps]
    change = {"number": 1, "in_progress": bool(steps), "steps": built, "restart": restart}
    whole = {"ranks": ranks, "change": change, "verdicts_paused": False, **fields}
    return msgspec.convert(whole, type=Status)


ACCEPTED = Accepted(request_id="r", change=1, changed=True, message="", ranks=2)


def ask(goal: Goal, found: Status) -> Progress:
    """Of ranks whose process was number 1 before."""
    return goal(found, Asked(accepted=ACCEPTED, processes={0: 1, 1: 1, 2: 1}))


def is_two(found: RankStatus) -> bool:
    return found.rank == 2


DRAINING = rank(2, state="draining", drain=DRAIN)
GONE = {"state": "drained", "in_map": False}
OUT = rank(2, drain=DRAIN, safe_to_terminate=True, **GONE)


def test_a_drain_waits_for_its_own_ranks_alone() -> None:
    goal = drained(is_two, "rank 2")
    steps = (("drain", 2, "two"), ("join", 3, "three"))
    assert ask(goal, status(DRAINING, steps=steps)).waits_for == ("two",)
    done = ask(goal, status(OUT, steps=(steps[1],)))
    assert (done.result, done.failed) == ("rank 2 is drained, and safe to terminate", False)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (rank(2), "somebody undrained it"),
        (rank(2, desired=False, drain=LEAVE, **GONE), "shall not exist any more"),
        (rank(2, drain=RESTART, safe_to_terminate=True, **GONE), "rank 2 shall start again"),
    ],
)
def test_a_drain_that_somebody_else_changed_has_failed(found: dict[str, Any], said: str) -> None:
    end = ask(drained(is_two, "rank 2"), status(found))
    assert (end.failed, said in end.result, end.waits_for) == (True, True, ()), end


def test_an_undrain_waits_until_the_rank_serves() -> None:
    goal = serving(is_two, "rank 2")
    away = rank(2, state="ready", in_map=False)
    assert ask(goal, status(away, steps=(("join", 2, "loads"),))).waits_for == ("loads",)
    assert ask(goal, status(rank(2, state="dead"))).waits_for == ("the next map",)
    assert ask(goal, status(rank(2))).result == "rank 2 serves"
    for undone in (rank(2, desired=False), DRAINING, OUT):
        assert ask(goal, status(undone)).failed
    assert ask(goal, status()).failed


@pytest.mark.parametrize(
    ("ranks", "steps", "waits_for"),
    [
        ([rank(0), rank(1, state="absent", in_map=False)], (("join", 1, "comes"),), ("comes",)),
        (
            [rank(0), rank(1), rank(2, desired=False, drain=LEAVE)],
            (("leave", 2, "goes"),),
            ("goes",),
        ),
        (
            [rank(0), rank(1), rank(2, desired=False, in_map=False)],
            (("leave", 2, "its process ends"),),
            ("its process ends",),
        ),
        ([rank(0), rank(1, state="dead")], (), ("the next map",)),
        ([rank(0), rank(1)], (("restart", 1, "later"),), ()),
    ],
)
def test_scale_waits_for_ranks_that_come_and_go(
    ranks: list[dict[str, Any]], steps: Any, waits_for: tuple[str, ...]
) -> None:
    progress = ask(scaled(2), status(*ranks, steps=steps))
    assert (progress.waits_for, progress.failed) == (waits_for, False)


def test_ranks_that_are_drained_are_said_and_not_counted() -> None:
    assert (
        ask(scaled(3), status(rank(0), rank(1), OUT)).result == "2 ranks serve; rank 2 is drained"
    )


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (scaled(3), "not scaled to 3 ranks: 2 shall exist"),
        (scaled(with_=[0, 5]), "rank 5 shall not exist any more"),
        (scaled(without=[1]), "rank 1 shall stay"),
    ],
)
def test_a_scale_that_another_one_overtook_has_failed(goal: Goal, said: str) -> None:
    """All ranks of the newer plan serve, so nothing is left to wait for."""
    end = ask(goal, status(rank(0), rank(1)))
    assert (end.failed, said in end.result) == (True, True), end


def test_a_scale_by_so_many_more_is_compared_with_the_number_that_was_accepted() -> None:
    assert not ask(scaled(), status(rank(0), rank(1))).failed
    assert ask(scaled(), status(rank(0))).result.startswith("not scaled to 2 ranks: 1 shall exist")


def test_replace_waits_until_the_rank_serves_there() -> None:
    goal = replaced(2, "b")
    leaving = rank(2, state="draining", drain=LEAVE, desired_node="b")
    assert ask(goal, status(leaving, steps=(("leave", 2, "leaves"),))).waits_for == ("leaves",)
    assert ask(goal, status(rank(2, desired_node="b"))).waits_for == ("the next map",)
    there = rank(2, node="b", desired_node="b", process=2)
    assert ask(goal, status(there)).result == "rank 2 serves on b"


@pytest.mark.parametrize(
    ("node", "found"),
    [
        ("b", rank(2, desired=False)),
        ("b", rank(2, desired_node="a")),  # undrained: it stays
        ("b", rank(2)),
        ("b", rank(2, drain=DRAIN, desired_node="b", **GONE)),
        ("a", rank(2)),  # its process is the one that it had
    ],
)
def test_a_replace_that_somebody_undid_has_failed(node: str, found: dict[str, Any]) -> None:
    end = ask(replaced(2, node), status(found))
    assert (end.failed, "rank 2 was not moved" in end.result) == (True, True), end


def test_a_restart_ends_when_all_have_new_processes_and_are_back() -> None:
    waiting, new = status(rank(0), steps=(("restart", 0, "r"),), restart=(0,)), rank(0, process=2)
    assert ask(restarted(), waiting).waits_for == ("r",)
    assert ask(restarted(), status(rank(0, drain=RESTART))).waits_for == ("the next map",)
    assert ask(restarted(), status(new, steps=(("join", 0, "j"),))).waits_for == ("j",)
    assert ask(restarted(), status(rank(0, process=2, state="dead"))).waits_for
    done = ask(restarted(), status(new, steps=(("drain", 1, "d"),)))
    assert (done.result, done.failed) == ("every rank has a new process, and serves", False)
    done = ask(restarted(), status(new, OUT))
    assert (done.failed, done.result.endswith("; rank 2 is drained, and as before")) == (
        False,
        True,
    )


def test_a_restart_that_was_stopped_or_undone_has_failed() -> None:
    end = ask(restarted(), status(rank(0, process=2), rank(1), rank(2)))
    assert (end.failed, "not restarted: ranks 1, 2 " in end.result) == (True, True), end
    assert ask(restarted([2]), status(rank(0), OUT)).failed
    assert ask(restarted([2]), status(rank(0))).failed


def test_the_end_of_a_restart_and_a_pause_are_looked_up_too() -> None:
    assert ask(restart_stopped, status(rank(0))).result == "no further restarts"
    assert ask(restart_stopped, status(rank(0), restart=(0,))).failed
    given, paused = status(rank(0)), status(rank(0), verdicts_paused=True)
    assert [ask(verdicts(paused=True), found).failed for found in (given, paused)] == [True, False]
    assert [ask(verdicts(paused=False), found).failed for found in (given, paused)] == [False, True]


@pytest.mark.parametrize(
    ("asked", "done", "num_steps", "waits_for", "result"),
    [
        (2, 1, 0, ("the leader plans where experts are worth most",), ""),
        (2, 1, 3, ("experts move: 3 steps planned so far",), ""),
        (2, 2, 1, (), "experts were moved, in 1 step; nothing more is worth a move"),
        (2, 2, 0, (), "nothing was moved: no other placement is better"),
    ],
)
def test_a_rebalance_waits_until_nothing_is_worth_a_move(
    asked: int, done: int, num_steps: int, waits_for: tuple[str, ...], result: str
) -> None:
    rebalance = {"asked": asked, "done": done, "num_steps": num_steps}
    progress = ask(rebalanced, status(rank(0), rebalance=rebalance))
    assert progress == Progress(waits_for=waits_for, result=result)
