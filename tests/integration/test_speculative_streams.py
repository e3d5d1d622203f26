"""Speculative decoding in a whole instance: with real processes, and a rank killed in mid-stream,
every client gets the tokens of an instance that drafts nothing."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.model_tools.seeded_drafts import Guesses
from tests.support.cluster import AtTotal, Cluster, StreamResult, running_cluster
from tests.support.draft_checkpoints import save_with_drafts

NEW_TOKENS = 160
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.2, "seed": 4, "top_p": 0.9, "top_k": 40},
    {"repetition_penalty": 1.1},
    {"temperature": 0.7, "seed": 5, "stop": ["qz", "xj"]},
    {"max_tokens": 61, "logprobs": 2},
)

pytestmark = pytest.mark.slow


def requests() -> list[dict[str, Any]]:
    draw = random.Random(8)
    return [
        {
            "prompt": [draw.randrange(20, 500) for _ in range(30 + 7 * number)],
            "max_tokens": NEW_TOKENS,
            **SAMPLINGS[number % len(SAMPLINGS)],
        }
        for number in range(2 * len(SAMPLINGS))
    ]


async def run_streams(
    cluster: Cluster, on_token: Callable[[int], None] = lambda count: None
) -> list[StreamResult]:
    async with asyncio.TaskGroup() as tasks:
        streams = [
            tasks.create_task(cluster.stream(on_token=on_token, **request))
            for request in requests()
        ]
    return [each.result() for each in streams]


async def drafts(cluster: Cluster) -> tuple[int, int]:
    """How many were verified, and how many of them were right. One that comes back does not answer
    yet."""
    ranks = [rank for rank in (await cluster.status())["ranks"] if rank["answers"]]
    return sum(r["tokens_drafted"] for r in ranks), sum(r["drafts_accepted"] for r in ranks)


@pytest.mark.timeout(300)
async def test_tokens_are_those_without_drafts_though_a_rank_dies(tmp_path: Path) -> None:
    model = save_with_drafts(tmp_path / "model", guesses=Guesses.GOOD)
    async with running_cluster(tmp_path / "plain", model, ranks=1) as plain:
        expected = await run_streams(plain)
        assert await drafts(plain) == (0, 0)
    assert all(result.error is None for result in expected)
    flags = ("--speculative-tokens", "1")
    async with running_cluster(tmp_path / "run", model, ranks=3, flags=flags) as cluster:
        live = await cluster.wait_live(3)
        total = sum(len(result.token_ids) for result in expected)
        midway = AtTotal(total // 3)
        running = asyncio.ensure_future(run_streams(cluster, on_token=midway))
        await midway.reached.wait()
        os.kill(live[1], signal.SIGKILL)
        assert await running == expected
        num_drafted, num_accepted = await drafts(cluster)
        assert 0.5 * num_drafted < num_accepted < num_drafted
        await cluster.wait_live(3)
        assert await run_streams(cluster) == expected
