"""A rate per minute: what was taken comes back evenly, and never more than a minute's amount."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.token_bucket import TokenBucket

EVENTS = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 150)), max_size=60)


@given(EVENTS)
def test_the_rate_holds_in_the_long_run_whatever_is_asked(events: list[tuple[float, int]]) -> None:
    bucket, now, taken = TokenBucket(60, 0.0), 0.0, 0
    for pause_s, amount in events:
        now += pause_s
        if not bucket.wait_s(amount, now):
            bucket.take(amount, now)
            taken += amount
        assert taken <= 60 + now + 90 + 1e-6, "a minute's amount, a minute's debt, 1 a second"


@given(EVENTS)
def test_the_wait_is_exact(events: list[tuple[float, int]]) -> None:
    bucket, now = TokenBucket(60, 0.0), 0.0
    for pause_s, amount in events:
        now += pause_s
        wait_s = bucket.wait_s(amount, now)
        if wait_s > 0.01:
            assert bucket.wait_s(amount, now + wait_s - 0.005) > 0
        now += wait_s
        assert bucket.wait_s(amount, now) < 1e-6
        bucket.take(amount, now)


def test_what_is_given_back_is_there_again_and_no_more_than_that() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.take(50, 0.0)
    bucket.take(-30, 0.0)
    assert bucket.level(0.0) == 40
    bucket.take(-30, 0.0)
    assert bucket.level(0.0) == 60
    assert bucket.full_in_s(0.0) == 0


def test_a_clock_that_stands_still_gives_nothing() -> None:
    bucket = TokenBucket(60, 5.0)
    bucket.take(60, 5.0)
    assert bucket.level(5.0) == 0
    assert bucket.level(4.0) == 0
    assert bucket.full_in_s(5.0) == 60
