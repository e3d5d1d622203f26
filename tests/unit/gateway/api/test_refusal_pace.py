"""When a client is told that its request is refused, on virtual time."""

from __future__ import annotations

import asyncio

import pytest

from gateway.api.refusal_pace import BURST, INTERVAL_S, WAIT_MAX_S, RefusalPace
from tests.sim.sim_loop import SimLoop


def times_told(clients: list[str], *, served: str) -> dict[str, list[float]]:
    """When each refusal of these is told, in seconds, if only `served` has requests in flight."""
    loop, told = SimLoop(), dict[str, list[float]]()

    async def run() -> None:
        pace, began = RefusalPace(lambda client: client != served), loop.time()

        async def refuse(client: str) -> None:
            await pace.turn(client)
            told.setdefault(client, []).append(loop.time() - began)

        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(refuse(client))

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(run())
    return told


def test_one_that_is_refused_again_and_again_is_told_at_a_bounded_rate() -> None:
    told = times_told(["hostile"] * (BURST + 20), served="other")["hostile"]
    assert told[:BURST] == [0.0] * BURST
    assert told[-1] == pytest.approx(19 * INTERVAL_S)


def test_who_is_refused_once_waits_for_nobody() -> None:
    told = times_told(["hostile"] * 80 + ["third"], served="other")
    assert told["third"] == [0.0]


def test_who_is_alone_is_told_at_once() -> None:
    assert set(times_told(["one"] * 500, served="one")["one"]) == {0.0}


def test_nobody_is_told_later_than_after_a_few_seconds() -> None:
    assert max(times_told(["hostile"] * 500, served="other")["hostile"]) <= WAIT_MAX_S + 0.001
