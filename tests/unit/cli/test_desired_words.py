"""What `starfish watch` says of planned changes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cli.observe.desired_words import changes_in_words
from cli.observe.event_formatter import EventFormatter
from shared.desired_state import AfterDrain, DesiredRank, DesiredState, Drain, RollingRestart
from shared.keys import Keys
from shared.records import pack_record
from shared.store import WatchEvent
from shared.types import NodeId, RankId

KEYS = Keys("t")
NOTHING = DesiredState()
TWO = DesiredState(
    ranks=(DesiredRank(rank=RankId(0), node=NodeId("a")), DesiredRank(rank=RankId(1)))
)


def drained(after: AfterDrain) -> DesiredState:
    return DesiredState(drains=(Drain(rank=RankId(2), after=after, grace_s=5),))


@pytest.mark.parametrize(
    ("after", "begun", "ended"),
    [
        (AfterDrain.STAY, "rank 2 is to be drained", "rank 2 is to serve again"),
        (AfterDrain.RESTART, "rank 2 is to be restarted", "rank 2 has a new process"),
        (AfterDrain.LEAVE, "rank 2 is to leave", "rank 2 has left"),
    ],
)
def test_a_drain_begins_and_ends(after: AfterDrain, begun: str, ended: str) -> None:
    grace = ": its sessions may finish there for 5 s"
    assert changes_in_words(NOTHING, drained(after)) == (begun + grace,)
    assert changes_in_words(drained(after), NOTHING) == (ended,)


def test_ranks_come_go_and_move() -> None:
    assert changes_in_words(NOTHING, TWO) == ("ranks 0, 1 are wanted",)
    moved = replace(
        TWO, ranks=(DesiredRank(rank=RankId(0), node=NodeId("b")), DesiredRank(rank=RankId(4)))
    )
    assert changes_in_words(TWO, moved) == (
        "rank 0 is to run on b",
        "rank 4 is wanted",
        "rank 1 is wanted no more",
    )


def test_the_rest() -> None:
    restart = DesiredState(restart=RollingRestart(ranks=(RankId(0), RankId(1))))
    assert changes_in_words(NOTHING, restart) == (
        "ranks 0, 1 are to be restarted, one after the other",
    )
    assert changes_in_words(restart, NOTHING) == ("no rank waits for its restart any more",)
    paused = DesiredState(verdicts_paused=True)
    assert changes_in_words(NOTHING, paused) == ("verdicts are paused",)
    assert changes_in_words(paused, NOTHING) == ("verdicts are given again",)
    assert changes_in_words(NOTHING, DesiredState(rebalances=1)) == (
        "experts are to be rebalanced",
    )


def test_watch_has_a_line_for_each_change_and_none_for_bookkeeping() -> None:
    formatter = EventFormatter(KEYS)

    def lines(state: DesiredState) -> list[str]:
        event = WatchEvent(key=KEYS.desired, value=pack_record(state), mod_revision=1)
        return [line.text for line in formatter.lines([event])]

    first = DesiredState(change=1, verdicts_paused=True, requests=("a",))
    assert lines(first) == ["change 1: verdicts are paused"]
    assert lines(replace(first, requests=("a", "b"))) == []
    assert lines(replace(first, change=2, verdicts_paused=False)) == [
        "change 2: verdicts are given again"
    ]
