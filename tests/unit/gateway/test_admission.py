"""Admission: a release undoes its admission, and a full gateway rejects."""

from __future__ import annotations

import pytest

from gateway.admission import Admission, AdmissionLimits
from shared.errors import Overloaded


def admission(tokens_max: int = 100, sessions_max: int = 3) -> Admission:
    return Admission(AdmissionLimits(tokens_max=tokens_max, sessions_max=sessions_max))


def test_tokens_up_to_the_budget_are_admitted_and_one_more_is_not() -> None:
    door = admission()
    door.admit(tokens=60)
    door.admit(tokens=40)
    with pytest.raises(Overloaded) as caught:
        door.admit(tokens=1)
    assert caught.value.retry_after_s >= 1
    door.release(tokens=40, duration_s=1.0)
    door.admit(tokens=40)


def test_the_number_of_sessions_is_bounded() -> None:
    door = admission()
    door.admit(tokens=1, sessions=2)
    with pytest.raises(Overloaded):
        door.admit(tokens=1, sessions=2)
    door.admit(tokens=1)


def test_what_exceeds_the_whole_budget_may_have_it_alone() -> None:
    door = admission()
    door.admit(tokens=1000)
    with pytest.raises(Overloaded):
        door.admit(tokens=1)


def test_a_refusal_counts_nothing() -> None:
    door = admission()
    door.admit(tokens=90)
    with pytest.raises(Overloaded):
        door.admit(tokens=20)
    assert (door.tokens, door.sessions) == (90, 1)


def test_retry_after_follows_how_long_sessions_live() -> None:
    door = admission()
    for _ in range(50):
        door.admit(tokens=1)
        door.release(tokens=1, duration_s=100.0)
    assert 5 <= door.retry_after_s() <= 30
