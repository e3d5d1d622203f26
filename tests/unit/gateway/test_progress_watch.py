"""When a rank that answers counts as standing still."""

from __future__ import annotations

from gateway.progress_watch import ProgressWatch
from shared.types import Epoch, Member, Step
from shared.wire import Load
from tests.support.toy_rank import ToyRank

MEMBER, OTHER = ToyRank(0).member, ToyRank(1).member
IDLE = Load(running=0, waiting=0, tokens=0, kv_blocks_free=1, kv_blocks=1)
BUSY = Load(running=0, waiting=1, tokens=5, kv_blocks_free=1, kv_blocks=1)


def report(
    watch: ProgressWatch,
    step: int,
    load: Load,
    now: float,
    epoch: int = 1,
    member: Member = MEMBER,
) -> None:
    watch.on_report(member, Epoch(epoch), Step(step), load, now)


def test_a_rank_with_work_and_without_steps_stands_still() -> None:
    watch = ProgressWatch()
    report(watch, 7, BUSY, 0.0)
    report(watch, 7, BUSY, 4.0)
    assert watch.stands_still_since(MEMBER, 4.0, after_s=5.0) is None
    assert watch.stands_still_since(MEMBER, 5.0, after_s=5.0) == 0.0


def test_a_step_an_epoch_or_idleness_is_progress() -> None:
    watch = ProgressWatch()
    report(watch, 7, BUSY, 0.0)
    report(watch, 8, BUSY, 1.0)
    assert watch.stands_still_since(MEMBER, 5.9, after_s=5.0) is None
    report(watch, 8, BUSY, 6.0, epoch=2)
    report(watch, 8, IDLE, 9.0, epoch=2)
    assert watch.stands_still_since(MEMBER, 13.9, after_s=5.0) is None
    assert watch.stands_still_since(MEMBER, 14.0, after_s=5.0) == 9.0


def test_a_rank_that_is_not_known_does_not_stand_still() -> None:
    watch = ProgressWatch()
    report(watch, 7, BUSY, 0.0)
    watch.forget(MEMBER)
    assert watch.stands_still_since(MEMBER, 99.0, after_s=5.0) is None


def test_a_rank_without_which_others_step_on_is_left_behind() -> None:
    watch = ProgressWatch()
    report(watch, 7, BUSY, 0.0)
    watch.on_silent([MEMBER])
    report(watch, 9, BUSY, 0.1, member=OTHER)
    report(watch, 11, BUSY, 0.2, member=OTHER)
    assert not watch.is_left_behind(MEMBER)
    watch.on_silent([MEMBER])
    report(watch, 12, BUSY, 0.3, member=OTHER)
    assert watch.is_left_behind(MEMBER)
    assert not watch.is_left_behind(OTHER)
    watch.on_silent([])
    assert not watch.is_left_behind(MEMBER)


def test_a_rank_that_answers_is_not_left_behind() -> None:
    watch = ProgressWatch()
    report(watch, 7, BUSY, 0.0)
    report(watch, 9, BUSY, 0.1, member=OTHER)
    report(watch, 90, BUSY, 0.2, member=OTHER)
    assert not watch.has_silent
    assert not watch.is_left_behind(MEMBER)


def test_a_rank_of_another_epoch_is_not_left_behind() -> None:
    watch = ProgressWatch()
    report(watch, 7, BUSY, 0.0, epoch=1)
    watch.on_silent([MEMBER])
    report(watch, 30, BUSY, 0.1, epoch=2, member=OTHER)
    report(watch, 60, BUSY, 0.2, epoch=2, member=OTHER)
    assert not watch.is_left_behind(MEMBER)
    watch.forget(MEMBER)
    assert not watch.is_left_behind(MEMBER)


def test_what_another_first_tells_says_nothing_of_when_it_was() -> None:
    """It was silent itself, and both stand still: it took these steps before."""
    watch = ProgressWatch()
    report(watch, 7, BUSY, 0.0)
    report(watch, 7, BUSY, 0.0, member=OTHER)
    watch.on_silent([MEMBER, OTHER])
    watch.on_silent([MEMBER])
    report(watch, 56, BUSY, 1.0, member=OTHER)
    report(watch, 58, BUSY, 1.2, member=OTHER)
    assert not watch.is_left_behind(MEMBER)
    report(watch, 59, BUSY, 1.3, member=OTHER)
    assert watch.is_left_behind(MEMBER)


def test_another_whose_link_broke_begins_anew() -> None:
    watch = ProgressWatch()
    report(watch, 7, BUSY, 0.0)
    watch.on_silent([MEMBER])
    report(watch, 9, BUSY, 0.1, member=OTHER)
    watch.forget(OTHER)
    assert not watch.is_left_behind(MEMBER)
    report(watch, 90, BUSY, 0.2, member=OTHER)
    assert not watch.is_left_behind(MEMBER)
