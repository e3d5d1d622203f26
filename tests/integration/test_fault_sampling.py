"""Sampling features across a death: penalties, bias, min-p, log-probabilities and choices go on as
if nothing had happened, and a prompt's scores are the same whoever computed them, to the bit."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from tests.support.authentication import client_session
from tests.support.cluster import Cluster, running_cluster, stream_events

NUM_RANKS = 3
NEW_TOKENS = 48

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 0},
    {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5, "logprobs": 3},
    {"temperature": 0.9, "min_p": 0.02, "logprobs": 2, "logit_bias": {"17": 4.0, "401": -100}},
    {"temperature": 1.1, "repetition_penalty": 1.1, "frequency_penalty": -0.3, "n": 2},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "presence_penalty": 1.0, "logprobs": 20},
    {"temperature": 0.7, "echo": True, "logprobs": 1, "min_p": 0.1},
]


def prompt_of(number: int, num_tokens: int = 40) -> list[int]:
    draw = random.Random(number)
    return [draw.randrange(300, 4000) for _ in range(num_tokens)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("sampling")
    model = folder / "model"
    create_seeded_checkpoint(model)
    async with running_cluster(folder / "run", Path(model), ranks=NUM_RANKS) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with client_session(timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session


class Seen:
    """All that a client was told of each choice."""

    def __init__(self) -> None:
        self.said: dict[int, dict[str, Any]] = {}

    def take(self, choice: dict[str, Any]) -> None:
        said = self.said.setdefault(choice["index"], {"text": "", "ids": [], "finish": None})
        said["text"] += choice["text"]
        said["ids"] += choice["token_ids"]
        said["finish"] = choice["finish_reason"] or said["finish"]
        for key, values in (choice["logprobs"] or {}).items():
            said.setdefault(key, []).extend(values)


async def run_streams(
    cluster: Cluster, http: aiohttp.ClientSession, on_token: Callable[[], None]
) -> list[dict[int, dict[str, Any]]]:
    async def one(number: int, sampling: dict[str, Any]) -> dict[int, dict[str, Any]]:
        seen = Seen()
        body = {
            "prompt": prompt_of(number),
            "max_tokens": NEW_TOKENS,
            "seed": number,
            "ignore_eos": True,
            "return_token_ids": True,
            **sampling,
        }
        async for event in stream_events(http, cluster, body):
            assert "error" not in event, event
            for choice in event["choices"]:
                seen.take(choice)
                on_token()
        return seen.said

    async with asyncio.TaskGroup() as tasks:
        streams = [
            tasks.create_task(one(n + 10 * again, sampling))
            for again in range(2)
            for n, sampling in enumerate(SAMPLINGS)
        ]
    return [stream.result() for stream in streams]


class Countdown:
    def __init__(self, left: int) -> None:
        self._left = left
        self.over = asyncio.Event()

    def __call__(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self.over.set()


async def test_sampled_sessions_go_on_with_the_same_tokens_and_logprobs(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.wait_live(NUM_RANKS)
    undisturbed = await run_streams(cluster, http, lambda: None)
    for said in undisturbed:
        for choice in said.values():
            assert (len(choice["ids"]), choice["finish"]) == (NEW_TOKENS, "length")
    assert undisturbed[3][0]["ids"] != undisturbed[3][1]["ids"], "choices should differ"
    assert 401 not in undisturbed[2][0]["ids"]
    for rank in range(NUM_RANKS):
        live = await cluster.wait_live(NUM_RANKS)
        midway = Countdown(14 * NEW_TOKENS * (rank + 1) // 5)
        running = asyncio.ensure_future(run_streams(cluster, http, midway))
        await midway.over.wait()
        os.kill(live[rank], signal.SIGKILL)
        assert await running == undisturbed, f"rank {rank}"


async def scores_of(
    cluster: Cluster, http: aiohttp.ClientSession, number: int, **fields: Any
) -> list[Any]:
    body = {
        "model": await cluster.model_name(),
        "prompt": prompt_of(number, 600),
        "max_tokens": 0,
        "prompt_logprobs": 0,
        **fields,
    }
    async with http.post(f"{cluster.url}/v1/completions", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    (choice,) = answer["choices"]
    scores: list[Any] = choice["prompt_logprobs"]
    return scores


async def test_a_prompts_scores_are_the_same_to_the_bit_across_deaths(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    async def score_all() -> list[list[Any]]:
        return await asyncio.gather(*(scores_of(cluster, http, n) for n in range(50, 56)))

    await cluster.wait_live(NUM_RANKS)
    alone = [await scores_of(cluster, http, n) for n in range(50, 56)]
    for n, scores in zip(range(50, 56), alone, strict=True):
        prompt = prompt_of(n, 600)
        assert scores[0] is None
        assert [list(entry) for entry in scores[1:]] == [[str(token)] for token in prompt[1:]]
    assert await score_all() == alone, "neighbours and chunking should not matter"
    for rank, delay_s in enumerate((0.05, 0.15)):
        live = await cluster.wait_live(NUM_RANKS)
        running = asyncio.ensure_future(score_all())
        await asyncio.sleep(delay_s)
        os.kill(live[rank], signal.SIGKILL)
        assert await running == alone, f"rank {rank}"
