"""The central property, with real processes and real signals: whichever rank dies, whenever it
dies, every client gets the tokens of the undisturbed run, each once and in order."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from tests.support.cluster import AtTotal, Cluster, StreamResult, running_cluster

NUM_RANKS = 4
NUM_STREAMS = 16
NEW_TOKENS = 48
PROMPT_TOKENS = 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]


def prompts(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(300, 4000) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_STREAMS)]


async def run_streams(
    cluster: Cluster, seed: int, on_token: Callable[[int], None] = lambda count: None
) -> list[StreamResult]:
    async with asyncio.TaskGroup() as tasks:
        streams = [
            tasks.create_task(cluster.stream(p, max_tokens=NEW_TOKENS, on_token=on_token))
            for p in prompts(seed)
        ]
    return [each.result() for each in streams]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("fault")
    model = folder / "model"
    create_seeded_checkpoint(model)
    async with running_cluster(folder / "run", Path(model), ranks=NUM_RANKS) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def oracle(cluster: Cluster) -> list[StreamResult]:
    await cluster.wait_live(NUM_RANKS)
    results = await run_streams(cluster, seed=1)
    for result in results:
        assert result.error is None
        assert len(result.token_ids) == NEW_TOKENS
        assert result.finish_reason == "length"
    assert len({r.token_ids for r in results}) == NUM_STREAMS, "the streams should differ"
    return results


@pytest.mark.parametrize("rank", range(NUM_RANKS))
async def test_death_in_mid_decode(cluster: Cluster, oracle: list[StreamResult], rank: int) -> None:
    live = await cluster.wait_live(NUM_RANKS)
    midway = AtTotal(NUM_STREAMS * NEW_TOKENS // 3)
    running = asyncio.ensure_future(run_streams(cluster, seed=1, on_token=midway))
    await midway.reached.wait()
    os.kill(live[rank], signal.SIGKILL)
    assert await running == oracle


@pytest.mark.parametrize("rank", range(NUM_RANKS))
async def test_death_in_prefill(cluster: Cluster, rank: int) -> None:
    """Of prompts that no rank has in its cache; the undisturbed run afterwards finds most there."""
    live = await cluster.wait_live(NUM_RANKS)
    running = asyncio.ensure_future(run_streams(cluster, seed=100 + rank))
    await asyncio.sleep(0.03)
    os.kill(live[rank], signal.SIGKILL)
    disturbed = await running
    assert all(r.error is None and len(r.token_ids) == NEW_TOKENS for r in disturbed)
    await cluster.wait_live(NUM_RANKS)
    assert disturbed == await run_streams(cluster, seed=100 + rank)


async def test_second_death_during_the_replay(cluster: Cluster, oracle: list[StreamResult]) -> None:
    live = await cluster.wait_live(NUM_RANKS)
    midway = AtTotal(NUM_STREAMS * NEW_TOKENS // 3)
    running = asyncio.ensure_future(run_streams(cluster, seed=1, on_token=midway))
    await midway.reached.wait()
    os.kill(live[0], signal.SIGKILL)
    await asyncio.sleep(0.02)
    os.kill(live[2], signal.SIGKILL)
    assert await running == oracle


@pytest.mark.parametrize("rank", range(NUM_RANKS))
async def test_death_while_idle(cluster: Cluster, oracle: list[StreamResult], rank: int) -> None:
    live = await cluster.wait_live(NUM_RANKS)
    os.kill(live[rank], signal.SIGKILL)
    await asyncio.sleep(0.5)
    assert await run_streams(cluster, seed=1) == oracle


async def test_a_stopped_rank_is_left_out_and_harms_nothing_when_it_wakes(
    cluster: Cluster, oracle: list[StreamResult]
) -> None:
    live = await cluster.wait_live(NUM_RANKS)
    midway = AtTotal(NUM_STREAMS * NEW_TOKENS // 3)
    running = asyncio.ensure_future(run_streams(cluster, seed=1, on_token=midway))
    await midway.reached.wait()
    os.kill(live[1], signal.SIGSTOP)
    await asyncio.sleep(1.0)
    os.kill(live[1], signal.SIGCONT)
    assert await running == oracle
    assert await cluster.wait_live(NUM_RANKS) == live, "the process should have come back in place"
    assert await run_streams(cluster, seed=1) == oracle
    os.kill(live[1], signal.SIGKILL)  # its agent knows its second incarnation
    await replaced(cluster, live[1])


async def test_a_rank_that_stays_stopped_is_replaced(
    cluster: Cluster, oracle: list[StreamResult]
) -> None:
    live = await cluster.wait_live(NUM_RANKS)
    os.kill(live[1], signal.SIGSTOP)
    assert await run_streams(cluster, seed=1) == oracle
    await replaced(cluster, live[1])


async def replaced(cluster: Cluster, pid: int) -> None:
    """Until all ranks are in the map, rank 1 in another process than this one."""
    async with asyncio.timeout(120):
        while (await cluster.wait_live(NUM_RANKS))[1] == pid:  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def test_sampled_streams_continue_with_the_same_draws(cluster: Cluster) -> None:
    async def sampled() -> list[StreamResult]:
        async with asyncio.TaskGroup() as tasks:
            streams = [
                tasks.create_task(
                    cluster.stream(p, max_tokens=NEW_TOKENS, temperature=0.9, top_p=0.95, seed=n)
                )
                for n, p in enumerate(prompts(2))
            ]
        return [each.result() for each in streams]

    live = await cluster.wait_live(NUM_RANKS)
    undisturbed = await sampled()
    running = asyncio.ensure_future(sampled())
    await asyncio.sleep(0.4)
    os.kill(live[3], signal.SIGKILL)
    assert await running == undisturbed
