"""When the next piece of one client's work begins."""

from __future__ import annotations

import pytest

from gateway.client_pace import ClientPace


def test_pieces_of_one_client_follow_one_another_and_do_not_delay_those_of_others() -> None:
    pace = ClientPace()
    assert [pace.reserve("a", 0.5, 10.0) for _ in range(3)] == [0.0, 0.5, 1.0]
    assert pace.reserve("b", 0.5, 10.0) == 0.0


def test_a_client_that_pauses_waits_for_nothing_and_saves_nothing_up() -> None:
    pace = ClientPace()
    pace.reserve("a", 0.5, 10.0)
    assert [pace.reserve("a", 0.5, 90.0) for _ in range(2)] == [0.0, 0.5]


def test_a_burst_is_in_advance() -> None:
    pace = ClientPace(burst_s=1.0)
    assert [pace.reserve("a", 0.5, 10.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]


def test_however_many_clients_come_the_ones_that_wait_for_nothing_are_forgotten() -> None:
    pace = ClientPace()
    pace.reserve("busy", 1000.0, 0.0)
    for number in range(5000):
        pace.reserve(f"client {number}", 0.5, float(number) / 10)
    assert len(pace) <= 300
    assert pace.reserve("busy", 1.0, 500.0) == pytest.approx(500.0)
