"""When the next few choices of a request may be opened."""

from __future__ import annotations

import asyncio

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


async def test_nothing_is_opened_while_a_rank_has_much_to_read() -> None:
    is_congested = True
    pace = OpeningPace(RequestPacer(), lambda: is_congested)
    turn = asyncio.create_task(pace.turn("a", True))
    await asyncio.sleep(0.02)
    assert not turn.done()
    is_congested = False
    async with asyncio.timeout(0.5):
        await turn


async def test_a_rank_that_reads_nothing_holds_nobody_up_for_ever() -> None:
    pace = OpeningPace(RequestPacer(), lambda: True)
    async with asyncio.timeout(5):
        await pace.turn("a", True)
