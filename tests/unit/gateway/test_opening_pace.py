"""When the next few choices of a request may be opened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gateway.opening_pace import RESTS, OpeningPace
from gateway.request_pacer import RequestPacer
from tests.sim.sim_loop import SimLoop


def nobody(client: str) -> bool:
    return False


def somebody(client: str) -> bool:
    return True


async def test_requests_of_others_begin_between_the_choices_of_one() -> None:
    pacer, order = RequestPacer(), list[str]()
    pace = OpeningPace(pacer, lambda: False, nobody)

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
    pace = OpeningPace(RequestPacer(), lambda: next(looks), nobody)
    async with asyncio.timeout(30):
        await pace.turn("a", True)
    assert list(looks) == []


async def test_a_rank_that_reads_nothing_holds_nobody_up_for_ever() -> None:
    pace = OpeningPace(RequestPacer(), lambda: True, nobody)
    async with asyncio.timeout(60):
        await pace.turn("a", True)


@pytest.mark.parametrize("serves_others", [nobody, somebody])
def test_choices_of_one_client_take_a_part_of_the_time_in_which_others_are_served(
    serves_others: Callable[[str], bool],
) -> None:
    """Ten requests of one client at once, on virtual time."""
    each_s, num_requests, num_pieces = 0.002, 10, 8
    loop = SimLoop()

    async def open_all() -> float:
        began, pace = loop.time(), OpeningPace(RequestPacer(), lambda: False, serves_others)

        async def open_choices() -> None:
            for piece in range(num_pieces):
                await pace.turn("hostile", piece == 0)
                loop._pass_time(each_s)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_requests):
                tasks.create_task(open_choices())
        return loop.time() - began

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        elapsed_s = runner.run(open_all())
    busy_s = num_requests * num_pieces * each_s
    if serves_others is nobody:
        assert elapsed_s == pytest.approx(busy_s)
    else:  # the first of each request do not wait, and nothing waits for the last rest
        assert busy_s * RESTS <= elapsed_s <= busy_s * (1 + RESTS)
