"""Admission: a release undoes its admission; a full gateway, and a client that has enough, are
refused with the right time to retry; and no client takes all."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import Admission, AdmissionLimits, Ticket
from gateway.api_keys import ANYBODY, ApiKey, KeyLimits
from gateway.cluster_view import ClusterView
from shared.errors import Overloaded
from tests.support.toy_rank import ToyRank


def admission(tokens_max: int = 100, sessions_max: int = 3) -> Admission:
    return Admission(AdmissionLimits(tokens_max=tokens_max, sessions_max=sessions_max))


def admit(
    door: Admission, *, tokens: int, choices: int = 1, key: ApiKey = ANYBODY, now: float = 0.0
) -> Ticket:
    ticket = door.enter(key, now)
    try:
        ticket.reserve(tokens=tokens, choices=choices, now=now)
    except Overloaded:
        ticket.release(now)
        raise
    return ticket


def view_of(*sessions_max: int) -> ClusterView:
    """Of one rank for each of these."""
    records = [
        replace(ToyRank(rank).record(), sessions_max=number)
        for rank, number in enumerate(sessions_max)
    ]
    members = tuple(record.member for record in records)
    return ClusterView(members=members, ranks={str(r.rank): r for r in records})


def key(name: str = "k", weight: float = 1.0, **limits: int) -> ApiKey:
    return ApiKey(name=name, weight=weight, limits=KeyLimits(**limits))


def test_tokens_up_to_the_budget_are_admitted_and_one_more_is_not() -> None:
    door = admission()
    admit(door, tokens=60)
    last = admit(door, tokens=40)
    with pytest.raises(Overloaded) as caught:
        admit(door, tokens=1)
    assert caught.value.retry_after_s >= 1
    last.release(1.0)
    admit(door, tokens=40)


def test_the_number_of_sessions_is_bounded() -> None:
    door = admission()
    admit(door, tokens=1, choices=2)
    with pytest.raises(Overloaded):
        admit(door, tokens=1, choices=2)
    admit(door, tokens=1)


def test_no_more_sessions_than_the_ranks_can_hold_if_they_tell() -> None:
    door = admission(tokens_max=1000, sessions_max=8)
    door.on_view(view_of(2, 2))
    for _ in range(4):
        admit(door, tokens=1)
    with pytest.raises(Overloaded):
        admit(door, tokens=1)
    door.on_view(view_of(2, 0))
    for _ in range(4):
        admit(door, tokens=1)
    with pytest.raises(Overloaded):
        admit(door, tokens=1)


def test_what_exceeds_the_whole_budget_may_have_it_alone() -> None:
    door = admission()
    admit(door, tokens=1000)
    with pytest.raises(Overloaded):
        admit(door, tokens=1)


def test_a_refusal_counts_nothing() -> None:
    door = admission()
    admit(door, tokens=90)
    with pytest.raises(Overloaded):
        admit(door, tokens=20)
    assert (door.tokens, door.sessions) == (90, 1)


def test_retry_after_follows_how_long_sessions_live() -> None:
    door = admission()
    for _ in range(50):
        admit(door, tokens=1).release(100.0)
    assert 5 <= door.retry_after_s() <= 30


def test_an_estimate_is_corrected_both_ways() -> None:
    door = admission()
    ticket = admit(door, tokens=50)
    ticket.correct(tokens=20, now=0.0)
    assert door.tokens == 20
    ticket.correct(tokens=90, now=0.0)
    assert door.tokens == 90


def test_a_correction_that_does_not_fit_changes_nothing() -> None:
    door = admission()
    admit(door, tokens=60)
    ticket = admit(door, tokens=10)
    with pytest.raises(Overloaded):
        ticket.correct(tokens=41, now=0.0)
    assert door.tokens == 70
    ticket.release(1.0)
    assert (door.tokens, door.sessions) == (60, 1)


def test_requests_a_minute_come_back_evenly_and_retry_after_says_when() -> None:
    door, limited = admission(sessions_max=100), key(requests_per_minute=6)
    for _ in range(6):
        door.enter(limited, 0.0).release(0.0)
    with pytest.raises(Overloaded) as caught:
        door.enter(limited, 0.0)
    assert (caught.value.code, caught.value.retry_after_s) == ("rate_limit_exceeded", 10)
    with pytest.raises(Overloaded):
        door.enter(limited, 9.9)
    door.enter(limited, 10.0)


def test_tokens_that_were_not_used_do_not_count_against_the_rate() -> None:
    door, limited = admission(tokens_max=10_000), key(tokens_per_minute=600)
    ticket = admit(door, tokens=600, key=limited)
    with pytest.raises(Overloaded) as caught:
        admit(door, tokens=100, key=limited, now=1.0)
    assert caught.value.retry_after_s == 9  # 10 a second
    ticket.tokens_used = 100
    ticket.release(1.0)
    admit(door, tokens=500, key=limited, now=1.0)


def test_a_request_above_the_rate_waits_for_a_full_minute_and_leaves_a_debt() -> None:
    door, limited = admission(tokens_max=10_000), key(tokens_per_minute=60)
    ticket = admit(door, tokens=120, key=limited)
    ticket.tokens_used = 120
    ticket.release(1.0)
    with pytest.raises(Overloaded) as caught:
        admit(door, tokens=120, key=limited, now=1.0)
    assert caught.value.retry_after_s == 119
    admit(door, tokens=120, key=limited, now=120.0)


@pytest.mark.parametrize(
    ("limits", "first", "second"),
    [
        ({"requests_max": 1}, (1, 1), (1, 1)),
        ({"choices_max": 4}, (1, 3), (1, 2)),
        ({"tokens_max": 50}, (40, 1), (11, 1)),
    ],
)
def test_what_a_key_has_in_flight_is_bounded(
    limits: dict[str, int], first: tuple[int, int], second: tuple[int, int]
) -> None:
    door = admission(tokens_max=10_000, sessions_max=100)
    limited = ApiKey(name="k", limits=KeyLimits(**limits))
    ticket = admit(door, tokens=first[0], choices=first[1], key=limited)
    with pytest.raises(Overloaded) as caught:
        admit(door, tokens=second[0], choices=second[1], key=limited)
    assert caught.value.code == "rate_limit_exceeded"
    admit(door, tokens=second[0], choices=second[1], key=key("other"))
    ticket.release(1.0)
    admit(door, tokens=second[0], choices=second[1], key=limited)


def test_a_request_of_no_allowed_rate_is_refused_before_anything_is_known_of_it() -> None:
    door, limited = admission(), key(requests_max=1)
    door.enter(limited, 0.0)
    with pytest.raises(Overloaded):
        door.enter(limited, 0.0)


def test_changed_limits_hold_at_once_and_what_was_taken_stays_taken() -> None:
    door = admission(sessions_max=100)
    for _ in range(6):
        door.enter(key(requests_per_minute=6), 0.0).release(0.0)
    with pytest.raises(Overloaded):
        door.enter(key(requests_per_minute=6, tokens_per_minute=5), 0.0)
    for _ in range(4):
        door.enter(key(requests_per_minute=10), 0.0).release(0.0)
    with pytest.raises(Overloaded):
        door.enter(key(requests_per_minute=10), 0.0)


def test_eight_requests_of_256_choices_do_not_fill_the_gateway_for_others() -> None:
    door = admission(tokens_max=8_000_000, sessions_max=2048)
    for _ in range(7):
        admit(door, tokens=256 * 100, choices=256, key=key("greedy"))
    with pytest.raises(Overloaded) as caught:
        admit(door, tokens=256 * 100, choices=256, key=key("greedy"))
    assert caught.value.code == "overloaded"
    admit(door, tokens=1000, choices=10, key=key("other"))
    with pytest.raises(Overloaded):
        admit(door, tokens=100, choices=256, key=key("greedy"))


REQUESTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 8), st.booleans()),
    max_size=80,
)


@settings(max_examples=60)
@given(REQUESTS)
def test_budgets_hold_whoever_asks_for_what(
    requests: list[tuple[int, int, int, bool]],
) -> None:
    """Also if estimates are corrected and requests end in any order; in the end nothing is left."""
    door, open_tickets = admission(tokens_max=200, sessions_max=40), list[Ticket]()
    for number, (who, tokens, choices, ends) in enumerate(requests):
        if ends and open_tickets:
            open_tickets.pop(who % len(open_tickets)).release(float(number))
            continue
        try:
            ticket = admit(door, tokens=tokens, choices=choices, key=key(str(who)))
        except Overloaded:
            continue
        open_tickets.append(ticket)
        with suppress(Overloaded):
            ticket.correct(tokens=tokens * 2, now=float(number))
        assert door.tokens <= 200
        assert door.sessions <= 40
    for ticket in open_tickets:
        ticket.release(1000.0)
    assert (door.tokens, door.sessions) == (0, 0)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6)), max_size=60))
def test_whoever_comes_finds_room_whatever_one_client_has_taken(
    requests: list[tuple[int, int]],
) -> None:
    door = admission(tokens_max=900, sessions_max=90)
    for tokens, choices in requests:
        try:
            admit(door, tokens=tokens, choices=choices, key=key("greedy"))
        except Overloaded:
            continue
    admit(door, tokens=50, choices=5, key=key("late"))
