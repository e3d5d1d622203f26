"""What a rank announces ends, has a bound that follows its own durations, and is told in time."""

from __future__ import annotations

import pytest

from gpu_worker.membership.announcements import FIRST_AT_MOST_S, TIMES_LONGEST, Announcements
from shared.config import LONGEST_ANNOUNCED_S
from shared.types import Operation
from shared.wire import AnnouncedOperation
from tests.support.fake_clock import FakeClock


class Rank:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.told: list[tuple[AnnouncedOperation, ...]] = []
        self.announcements = Announcements(
            self.clock, lambda: self.told.append(self.announcements.current())
        )


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_an_operation_is_told_before_it_begins_and_when_it_ends(rank: Rank) -> None:
    with rank.announcements.during(Operation.LOAD):
        assert len(rank.told) == 1
        rank.clock.advance(0.5)
        (left,) = rank.announcements.current()
        assert left.operation is Operation.LOAD
        assert left.at_most_ms == pytest.approx((FIRST_AT_MOST_S - 0.5) * 1000)
    assert rank.told[-1] == ()
    assert len(rank.told) == 2


def test_one_that_fails_ends_too(rank: Rank) -> None:
    with pytest.raises(ConnectionError), rank.announcements.during(Operation.MAP):
        raise ConnectionError
    assert rank.announcements.current() == ()


def test_one_that_takes_longer_than_it_might_is_announced_no_more(rank: Rank) -> None:
    rank.announcements.begin(Operation.LOAD)
    rank.clock.advance(FIRST_AT_MOST_S + 0.01)
    assert rank.announcements.current() == ()


def test_several_at_once_are_told_together(rank: Rank) -> None:
    load = rank.announcements.begin(Operation.LOAD)
    mapping = rank.announcements.begin(Operation.MAP)
    assert [each.operation for each in rank.told[-1]] == [Operation.LOAD, Operation.MAP]
    rank.announcements.end(load)
    assert [each.operation for each in rank.told[-1]] == [Operation.MAP]
    rank.announcements.end(mapping)
    rank.announcements.end(mapping)
    assert rank.told[-1] == ()


def test_the_bound_follows_the_longest_of_its_kind_and_is_itself_bounded(rank: Rank) -> None:
    for took_s, expected_s in ((0.1, FIRST_AT_MOST_S), (1.0, TIMES_LONGEST * 1.0), (0.1, 3.0)):
        with rank.announcements.during(Operation.MAP):
            rank.clock.advance(took_s)
        assert rank.announcements.at_most_s(Operation.MAP) == pytest.approx(expected_s)
    assert rank.announcements.at_most_s(Operation.LOAD) == FIRST_AT_MOST_S
    with rank.announcements.during(Operation.MAP):
        rank.clock.advance(30.0)
    assert rank.announcements.at_most_s(Operation.MAP) == LONGEST_ANNOUNCED_S
