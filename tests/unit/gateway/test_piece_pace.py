"""When the next piece of what a client asks for is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gateway.piece_pace import RESTS, PiecePace
from gateway.request_pacer import RequestPacer
from tests.sim.sim_loop import SimLoop


def nobody(client: str) -> bool:
    return False


def somebody(client: str) -> bool:
    return True


async def test_requests_of_others_begin_between_the_choices_of_one() -> None:
    pacer, order = RequestPacer(), list[str]()
    pace = PiecePace(pacer, lambda: False, nobody)

    async def open_choices() -> None:
        await pacer.begin("a")
        for piece in range(4):
            await pace.choices_turn("a", piece == 0)
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
    monkeypatch.setattr("gateway.piece_pace._WAIT_MAX_S", 3600.0)
    looks = iter([True] * 5 + [False])
    pace = PiecePace(RequestPacer(), lambda: next(looks), nobody)
    async with asyncio.timeout(30):
        await pace.choices_turn("a", True)
    assert list(looks) == []


async def test_a_rank_that_reads_nothing_holds_nobody_up_for_ever() -> None:
    pace = PiecePace(RequestPacer(), lambda: True, nobody)
    async with asyncio.timeout(60):
        await pace.choices_turn("a", True)


def elapsed_s(serves_others: Callable[[str], bool], each_s: float, *, chunks: bool) -> float:
    """Of ten requests of one client at once, each in eight pieces that take so long, on virtual
    time."""
    loop = SimLoop()

    async def do_all() -> float:
        began, pace = loop.time(), PiecePace(RequestPacer(), lambda: False, serves_others)

        async def do() -> None:
            for number in range(8):
                if chunks:
                    await pace.body_turn("hostile")
                else:
                    await pace.choices_turn("hostile", number == 0)
                loop._pass_time(each_s)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(10):
                tasks.create_task(do())
        return loop.time() - began

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(do_all())


@pytest.mark.parametrize("chunks", [False, True])
def test_pieces_of_one_client_take_a_part_of_the_time_in_which_others_are_served(
    chunks: bool,
) -> None:
    busy_s = 10 * 8 * 0.002
    taken_s = elapsed_s(somebody, 0.002, chunks=chunks)
    # A first guess of their cost is too low, and nobody waits for the last rest.
    assert busy_s * RESTS * 0.9 <= taken_s <= busy_s * (1 + RESTS)


@pytest.mark.parametrize("chunks", [False, True])
def test_a_client_that_is_alone_rests_from_nothing(chunks: bool) -> None:
    assert elapsed_s(nobody, 0.002, chunks=chunks) == pytest.approx(10 * 8 * 0.002)
