"""When the next few choices of a request may be opened."""

from __future__ import annotations

import asyncio

import pytest

from gateway.opening_pace import OpeningPace
from gateway.request_pacer import RequestPacer


async def test_requests_of_others_begin_between_the_choices_of_one() -> None:
    pacer, order = RequestPacer(), list[str]()
    pace = OpeningPace(pacer, lambda: False)

    async def open_choices() -> None:
        await pacer.begin("a")
        for piece in range(4):
            await pace.turn("a", piece == 0)
            order.append("a")

    async def request() -> None:
        await pacer.begin("b")
        order.append("b")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(open_choices())
        for _ in range(3):
            tasks.create_task(request())
    assert order[0] == "a", "no second turn for the first choices"
    assert sorted(order[1:4]) == ["a", "b", "b"] or sorted(order[1:4]) == ["a", "a", "b"]


async def test_nothing_is_opened_while_a_rank_has_much_to_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.opening_pace._WAIT_MAX_S", 3600.0)
    looks = iter([True] * 5 + [False])
    pace = OpeningPace(RequestPacer(), lambda: next(looks))
    async with asyncio.timeout(30):
        await pace.turn("a", True)
    assert list(looks) == []


async def test_a_rank_that_reads_nothing_holds_nobody_up_for_ever() -> None:
    pace = OpeningPace(RequestPacer(), lambda: True)
    async with asyncio.timeout(60):
        await pace.turn("a", True)
