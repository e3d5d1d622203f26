"""When a rank says that it does not hear who leads."""

from __future__ import annotations

from gpu_worker.membership.leader_watch import (
    LOOK_S,
    SILENCE_MIN_S,
    UNKNOWN_SILENCE_S,
    LeaderWatch,
)

INTERVAL_S = 0.5


def pinged(watch: LeaderWatch, name: str, times: int, first_at: float, every_s: float) -> float:
    """Returns when the last Ping came."""
    now = first_at
    for number in range(times):
        now = first_at + number * every_s
        if number > 0:
            wait(watch, now - every_s, every_s)
        watch.on_ping(name, now)
    return now


def wait(watch: LeaderWatch, since: float, seconds: float) -> float:
    """Looks as often as it should, and returns when it looked last."""
    now = since
    for tick in range(round(seconds / LOOK_S) + 1):
        now = since + tick * LOOK_S
        watch.on_look(now)
    return now


def test_a_rank_that_was_never_pinged_says_nothing() -> None:
    watch = LeaderWatch(0.0)
    watch.on_closed("a")
    assert watch.unheard(wait(watch, 0.0, 100.0)) is None


def test_a_connection_that_ends_says_at_once_whose_it_was() -> None:
    watch = LeaderWatch(0.0)
    now = pinged(watch, "a", 1, 10.0, INTERVAL_S)
    assert watch.unheard(now) is None
    watch.on_closed("a")
    assert watch.unheard(now) == "a"
    watch.on_ping("a", now + 0.1)
    assert watch.unheard(now + 0.1) is None


def test_the_end_of_a_former_leader_says_nothing() -> None:
    watch = LeaderWatch(0.0)
    now = pinged(watch, "a", 3, 10.0, INTERVAL_S)
    watch.on_ping("b", now)
    watch.on_closed("a")
    assert watch.unheard(now) is None


def test_silence_says_so_after_a_while() -> None:
    watch = LeaderWatch(0.0)
    last = pinged(watch, "a", 5, 10.0, INTERVAL_S)
    assert watch.unheard(wait(watch, last, SILENCE_MIN_S - LOOK_S)) is None
    assert watch.unheard(wait(watch, last, SILENCE_MIN_S + LOOK_S)) == "a"


def test_one_that_pings_seldom_may_be_silent_for_longer() -> None:
    watch = LeaderWatch(0.0)
    assert watch.unheard(wait(watch, pinged(watch, "a", 1, 10.0, 4.9), 4.9)) is None
    last = pinged(watch, "a", 4, 10.0, 5.0)
    assert watch.unheard(wait(watch, last, 9.0)) is None
    assert watch.unheard(wait(watch, last, 11.0)) == "a"


def test_of_one_that_has_pinged_once_silence_says_so_later() -> None:
    watch = LeaderWatch(0.0)
    watch.on_ping("a", 10.0)
    assert watch.unheard(wait(watch, 10.0, UNKNOWN_SILENCE_S - LOOK_S)) is None
    assert watch.unheard(wait(watch, 10.0, UNKNOWN_SILENCE_S + LOOK_S)) == "a"


def test_time_in_which_this_rank_did_not_run_does_not_count() -> None:
    watch = LeaderWatch(0.0)
    last = pinged(watch, "a", 5, 10.0, INTERVAL_S)
    watch.on_look(last + 60.0)
    assert watch.unheard(last + 60.0) is None
    assert watch.unheard(wait(watch, last + 60.0, SILENCE_MIN_S + LOOK_S)) == "a"
