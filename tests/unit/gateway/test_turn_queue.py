"""Turns to be prepared: few at a time, in fair order, and every one that was granted or waited is
accounted for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api_keys import ANYBODY, ApiKey
from gateway.turn_queue import Turn, TurnQueue
from shared.errors import Overloaded


def key(name: str, weight: float = 1.0) -> ApiKey:
    return ApiKey(name=name, weight=weight)


def queue(running_max: int = 4, waiting_max: int = 32, cost_max: float = 1e9) -> TurnQueue:
    return TurnQueue(running_max=running_max, waiting_max=waiting_max, waiting_cost_max=cost_max)


def test_a_client_without_a_name_may_have_all_turns_and_all_places() -> None:
    turns = queue(running_max=2, waiting_max=3)
    asked = [turns.ask(ANYBODY, 1) for _ in range(5)]
    assert [turn.is_granted for turn in asked] == [True, True, False, False, False]
    with pytest.raises(Overloaded):
        turns.ask(ANYBODY, 1)
    assert turns.finish(asked[0]) == [asked[2]]


def test_one_client_leaves_a_turn_and_places_to_others() -> None:
    turns = queue(running_max=4, waiting_max=32)
    asked = [turns.ask(key("greedy"), 1) for _ in range(3 + 28)]
    assert sum(turn.is_granted for turn in asked) == 3
    with pytest.raises(Overloaded):
        turns.ask(key("greedy"), 1)
    assert turns.ask(key("late"), 1).is_granted
    assert not turns.ask(key("late"), 1).is_granted


@pytest.mark.parametrize("client", [ANYBODY, key("a")])
def test_what_waits_is_bounded_in_all_and_one_may_be_of_any_size(client: ApiKey) -> None:
    turns = queue(running_max=1, cost_max=100)
    running = turns.ask(client, 1000)
    huge = turns.ask(client, 1000)
    with pytest.raises(Overloaded):
        turns.ask(client, 1)
    assert turns.finish(running) == [huge]
    for _ in range(8):
        turns.ask(client, 10)
    with pytest.raises(Overloaded):
        turns.ask(client, 30)
    assert not turns.ask(key("other"), 20).is_granted


def test_the_one_whose_requests_cost_least_is_next() -> None:
    turns = queue(running_max=1, waiting_max=100)
    running = turns.ask(key("first"), 1)
    large = [turns.ask(key("large"), 1000) for _ in range(3)]
    small = [turns.ask(key("small"), 10) for _ in range(3)]
    order: list[Turn] = []
    while granted := turns.finish(running):
        (running,) = granted
        order.append(running)
    assert order == [large[0], *small, *large[1:]] or order == [*small, *large]
    assert (turns.num_running, turns.num_waiting) == (0, 0)


def test_who_gives_up_frees_its_place_and_its_turn() -> None:
    turns = queue(running_max=1)
    running, waiting, last = (turns.ask(key("a"), 1) for _ in range(3))
    assert turns.give_up(waiting) == []
    assert turns.give_up(running) == [last]
    assert turns.finish(last) == []


EVENTS = st.lists(
    st.tuples(st.sampled_from(["ask", "finish", "give_up"]), st.integers(0, 30), st.integers(1, 9)),
    max_size=120,
)


@given(EVENTS)
def test_whatever_happens_nobody_is_forgotten(events: list[tuple[str, int, int]]) -> None:
    turns, present = queue(running_max=3, waiting_max=12), list[Turn]()
    for event, number, cost in events:
        if event == "ask":
            try:
                present.append(turns.ask(key("abc"[number % 3]), cost))
            except Overloaded:
                continue
        elif present:
            turn = present.pop(number % len(present))
            granted = turns.give_up(turn) if event == "give_up" else None
            if granted is None:
                granted = turns.finish(turn) if turn.is_granted else turns.give_up(turn)
            assert all(each.is_granted and each in present for each in granted)
        assert turns.num_running == sum(turn.is_granted for turn in present) <= 3
        assert turns.num_waiting == sum(not turn.is_granted for turn in present) <= 12
    while present:
        turn = next(each for each in present if each.is_granted)
        present.remove(turn)
        turns.finish(turn)
    assert (turns.num_running, turns.num_waiting) == (0, 0)
