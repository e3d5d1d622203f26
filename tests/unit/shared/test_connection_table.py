"""Which connections are accepted, and which have waited too long: every event in every state."""

from __future__ import annotations

import pytest

from shared.connection_table import (
    ConnectionId,
    ConnectionLimits,
    ConnectionTable,
    Refusal,
    client_of,
)

HEADER_S, IDLE_S = 10.0, 50.0


def table(connections_max: int = 3, per_address_max: int = 2) -> ConnectionTable:
    return ConnectionTable(
        ConnectionLimits(
            connections_max=connections_max,
            per_address_max=per_address_max,
            header_timeout_s=HEADER_S,
            idle_timeout_s=IDLE_S,
        )
    )


def opened(connections: ConnectionTable, address: str = "10.0.0.1") -> ConnectionId:
    found = connections.open(address, 0.0)
    assert not isinstance(found, Refusal)
    return found


def test_one_address_and_all_together_are_bounded_until_some_close() -> None:
    connections = table()
    first = opened(connections)
    opened(connections)
    assert connections.open("10.0.0.1", 0.0) is Refusal.ADDRESS_FULL
    opened(connections, "10.0.0.2")
    assert connections.open("10.0.0.3", 0.0) is Refusal.FULL
    connections.close(first)
    opened(connections)
    assert len(connections) == 3


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("", "", True),
    ],
)
def test_whom_an_address_is_counted_for(one: str, other: str, same: bool) -> None:
    assert (client_of(one) == client_of(other)) is same


def test_a_header_has_one_deadline_whatever_arrives() -> None:
    connections = table()
    waiting = opened(connections)
    connections.on_bytes(waiting, HEADER_S - 1)
    assert connections.expired(HEADER_S - 0.1) == []
    assert connections.expired(HEADER_S) == [waiting]
    assert not connections.spare(waiting, 5, HEADER_S)


def test_a_served_request_has_no_deadline_here() -> None:
    connections = table()
    served = opened(connections)
    connections.on_request(served)
    connections.on_bytes(served, 1.0)
    assert connections.expired(1e9) == []


def test_after_an_answer_silence_and_a_slow_header_end_it() -> None:
    connections = table()
    silent, slow = opened(connections), opened(connections)
    for connection in (silent, slow):
        connections.on_request(connection)
        connections.on_answer(connection, 100.0)
    connections.on_bytes(slow, 105.0)
    connections.on_bytes(slow, 114.0)
    assert connections.expired(105.0 + HEADER_S) == [slow]
    assert connections.expired(100.0 + IDLE_S) == [silent, slow]


def test_a_client_that_still_takes_an_answer_is_spared() -> None:
    connections = table()
    reading = opened(connections)
    connections.on_request(reading)
    connections.on_answer(reading, 0.0)
    assert connections.spare(reading, 900, IDLE_S)
    assert connections.expired(IDLE_S + 1) == []
    assert connections.spare(reading, 800, 2 * IDLE_S)
    assert not connections.spare(reading, 800, 3 * IDLE_S), "it took nothing"


def test_nothing_is_left_of_an_answer_without_unsent_bytes() -> None:
    connections = table()
    idle = opened(connections)
    connections.on_request(idle)
    connections.on_answer(idle, 0.0)
    assert not connections.spare(idle, 0, IDLE_S)
    connections.close(idle)
    connections.on_answer(idle, 0.0)
    assert len(connections) == 0


def serve(connections: ConnectionTable, connection: ConnectionId) -> ConnectionId:
    connections.on_request(connection)
    return connection


def test_there_is_nobody_to_go_while_there_is_room() -> None:
    connections = table()
    opened(connections)
    assert connections.makes_room_for("10.0.0.1") is None


def test_who_has_waited_longest_makes_room_for_whoever_comes() -> None:
    connections = table(connections_max=3, per_address_max=3)
    asked = serve(connections, opened(connections, "10.0.0.1"))
    silent = opened(connections, "10.0.0.2")
    opened(connections, "10.0.0.3")
    assert connections.makes_room_for("10.0.0.4") == silent
    connections.on_answer(asked, 1.0)
    connections.close(silent)
    opened(connections, "10.0.0.4")
    for expected in ("10.0.0.3", "answered", "10.0.0.4"):
        going = connections.makes_room_for("10.0.0.9")
        assert going is not None
        assert (going == asked) is (expected == "answered"), expected
        connections.close(going)
        serve(connections, opened(connections, "10.0.0.9"))
    assert connections.makes_room_for("10.0.0.9") is None
    assert connections.open("10.0.0.9", 0.0) is Refusal.ADDRESS_FULL


def test_an_address_that_has_its_part_makes_room_itself() -> None:
    connections = table(connections_max=10, per_address_max=2)
    opened(connections, "10.0.0.1")
    mine = [opened(connections, "10.0.0.2") for _ in range(2)]
    assert connections.makes_room_for("10.0.0.2") == mine[0]
    serve(connections, mine[0])
    assert connections.makes_room_for("10.0.0.2") == mine[1]
    serve(connections, mine[1])
    assert connections.makes_room_for("10.0.0.2") is None


def test_who_begins_another_request_waits_anew() -> None:
    connections = table(connections_max=2, per_address_max=2)
    first, second = (serve(connections, opened(connections)) for _ in range(2))
    connections.on_answer(first, 1.0)
    connections.on_answer(second, 2.0)
    connections.on_bytes(first, 3.0)
    assert connections.makes_room_for("10.0.0.1") == second
