"""Bytes of bodies that are on their way at once."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from gateway.api_keys import ApiKey
from gateway.body_room import SMALL_BYTES, BodyRoom
from shared.errors import Overloaded

MB = 1 << 20
ALICE, BOB = ApiKey(name="alice"), ApiKey(name="bob")


def fill(room: BodyRoom, client: ApiKey, stack: ExitStack) -> int:
    """How many bodies of 4 MB fit."""
    for number in range(1000):
        try:
            stack.enter_context(room.taken(client, 4 * MB))
        except Overloaded:
            return number
    raise AssertionError("there is no end")


def test_one_client_leaves_room_for_another_and_all_comes_back() -> None:
    room = BodyRoom(256 * MB)
    for _ in range(3):
        with ExitStack() as bodies:
            assert 50 <= fill(room, ALICE, bodies) < 64
            assert fill(room, BOB, bodies) >= 1


def test_small_bodies_are_not_counted() -> None:
    room = BodyRoom(4 * MB)
    with ExitStack() as bodies:
        for _ in range(1000):
            bodies.enter_context(room.taken(ALICE, SMALL_BYTES))
        with room.taken(ALICE, 4 * MB):
            pass


def test_what_was_refused_takes_nothing() -> None:
    room = BodyRoom(8 * MB)
    for _ in range(100):
        with pytest.raises(Overloaded), room.taken(ALICE, 9 * MB):
            pass
    with room.taken(ALICE, 8 * MB):
        pass
