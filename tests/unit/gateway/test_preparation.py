"""That a client whose turns take long rests between them while others are served, on virtual
time."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from gateway.api_keys import ANYBODY
from gateway.preparation import REST_MAX_S, Preparation
from tests.sim.sim_loop import SimLoop


def begun(
    each_s: float, *, rests: float, rests_for: bool, others: int = 0
) -> list[tuple[str, float]]:
    """Who had its turn when, if one client asks for four at once and then each of the others for
    one."""
    loop, turns = SimLoop(), list[tuple[str, float]]()

    async def run() -> None:
        preparation = Preparation(2, rests=rests, rests_for=lambda key: rests_for)
        began = loop.time()

        async def prepare(name: str) -> None:
            async with preparation.turn(replace(ANYBODY, name=name), cost=1.0, timeout_s=None):
                turns.append((name, round(loop.time() - began, 6)))
                await asyncio.sleep(each_s)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(prepare("hostile"))
            for number in range(others):
                tasks.create_task(prepare(f"other {number}"))

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(run())
    return turns


def test_a_client_rests_after_each_turn_while_others_are_served() -> None:
    times = [at for _, at in begun(0.1, rests=3.0, rests_for=True)]
    assert times == pytest.approx([0.0, 0.4, 0.8, 1.2], abs=1e-4)


def test_a_client_that_is_alone_does_not_rest() -> None:
    times = [at for _, at in begun(0.1, rests=3.0, rests_for=False)]
    assert times == pytest.approx([0.0, 0.1, 0.2, 0.3], abs=1e-4)


def test_another_has_its_turn_while_one_rests() -> None:
    turns = begun(0.1, rests=3.0, rests_for=True, others=1)
    assert turns[:2] == [("hostile", 0.0), ("other 0", 0.0)]


def test_a_rest_has_an_end() -> None:
    times = [at for _, at in begun(10.0, rests=3.0, rests_for=True)]
    assert times[1] == pytest.approx(10.0 + REST_MAX_S, abs=1e-4)
