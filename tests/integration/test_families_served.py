"""Other families in real processes: a rank is killed in mid-stream, and every client gets the
tokens of the undisturbed run. With latent attention and sparse, with sinks and windows, and without
any experts; and an answer that follows a grammar goes on following it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from pathlib import Path

import pytest

from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS
from tests.support.authentication import client_session
from tests.support.cluster import AtTotal, Cluster, StreamResult, running_cluster

NUM_RANKS = 3
NUM_STREAMS = 9
NEW_TOKENS = 120
VOCAB = SEEDED_CONFIGS["qwen3"]["vocab_size"]
SCHEMA = {
    "type": "object",
    "properties": {
        "names": {
            "type": "array",
            "items": {"type": "string", "maxLength": 8},
            "minItems": 5,
            "maxItems": 9,
        },
        "open": {"type": "boolean"},
    },
    "required": ["names", "open"],
    "additionalProperties": False,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def run_streams(cluster: Cluster, at_total: AtTotal | None = None) -> list[StreamResult]:
    draw = random.Random(3)
    async with asyncio.TaskGroup() as tasks:
        streams = [
            tasks.create_task(
                cluster.stream(
                    [draw.randrange(VOCAB - 3) for _ in range(30)],
                    max_tokens=NEW_TOKENS,
                    on_token=at_total or (lambda count: None),
                )
            )
            for _ in range(NUM_STREAMS)
        ]
    return [each.result() for each in streams]


async def guided_answers(url: str) -> list[str]:
    """Two choices, drawn from a model that knows no JSON."""
    body = {
        "prompt": "Answer:",
        "n": 2,
        "seed": 5,
        "max_tokens": 960,
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    }
    async with client_session() as http, http.post(f"{url}/v1/completions", json=body) as r:
        answer = await r.json()
        assert r.status == 200, answer
    return [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize("family", ["deepseek_v32", "gpt_oss", "qwen3"])
async def test_a_death_changes_no_token(tmp_path: Path, family: str) -> None:
    model = tmp_path / "model"
    create_seeded_checkpoint(model, family=family)
    async with running_cluster(tmp_path / "run", model, ranks=NUM_RANKS) as cluster:
        live = await cluster.wait_live(NUM_RANKS)
        oracle = await run_streams(cluster)
        assert all(r.error is None and len(r.token_ids) == NEW_TOKENS for r in oracle)
        assert len({r.token_ids for r in oracle}) == NUM_STREAMS, "the streams should differ"
        midway = AtTotal(NUM_STREAMS * NEW_TOKENS // 3)
        running = asyncio.ensure_future(run_streams(cluster, midway))
        await midway.reached.wait()
        os.kill(live[1], signal.SIGKILL)
        assert await running == oracle
        if family == "deepseek_v32":
            await check_guided(cluster)


async def check_guided(cluster: Cluster) -> None:
    live = await cluster.wait_live(NUM_RANKS)
    undisturbed = await guided_answers(cluster.url)
    for text in undisturbed:
        value = json.loads(text)
        assert len(value["names"]) >= 5
        assert isinstance(value["open"], bool)
    running = asyncio.ensure_future(guided_answers(cluster.url))
    await asyncio.sleep(0.2)
    os.kill(live[0], signal.SIGKILL)
    assert await running == undisturbed
