"""Tool calls and bad words across a death: a stream whose rank is killed in the middle of a call's
arguments goes on as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.authentication import client_session
from tests.support.cluster import Cluster, running_cluster

MODEL = Path(__file__).parents[2] / "models" / "starling-14m"
NUM_RANKS = 3
SEEDS = range(6)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tell_story",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "minLength": 150, "maxLength": 200},
                    "mood": {"enum": ["sad", "merry"]},
                },
                "required": ["text", "mood"],
                "additionalProperties": False,
            },
        },
    }
]
CALLS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a story of a fox."}],
    "tools": TOOLS,
    "tool_choice": "required",
    "max_tokens": 300,
    "temperature": 0.8,
    "stream": True,
    "stream_options": {"include_usage": True},
}
LIMITED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a story of a fox."}],
    "bad_words": ["the", "fox", "a", "was"],
    "max_tokens": 64,
    "ignore_eos": True,
    "stream": True,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with running_cluster(
        tmp_path_factory.mktemp("tools") / "run", MODEL, ranks=NUM_RANKS
    ) as running:
        yield running


class Answer:
    """What a client was told, without ids, which are random."""

    def __init__(self) -> None:
        self.rank = -1
        self.content = ""
        self.calls: list[dict[str, str]] = []
        self.call_ids: list[str] = []
        self.finish: str | None = None
        self.completion_tokens = 0

    def take(self, event: dict[str, Any]) -> None:
        assert "error" not in event, event
        if event.get("usage"):
            self.completion_tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            self.finish = choice["finish_reason"] or self.finish
            self.content += choice["delta"].get("content") or ""
            for part in choice["delta"].get("tool_calls", ()):
                self._take_call(part)

    def _take_call(self, part: dict[str, Any]) -> None:
        if part["index"] == len(self.calls):  # the first delta of a call has its name and id
            assert part["type"] == "function"
            assert part["function"]["arguments"] == ""
            self.call_ids.append(part["id"])
            self.calls.append({"name": part["function"]["name"], "arguments": ""})
        else:
            assert set(part) == {"index", "function"}
            assert set(part["function"]) == {"arguments"}
            self.calls[part["index"]]["arguments"] += part["function"]["arguments"]

    def plain(self) -> tuple[Any, ...]:
        return self.content, self.calls, self.finish, self.completion_tokens


async def run(
    cluster: Cluster, body: dict[str, Any], on_event: Callable[[Answer], None]
) -> list[Answer]:
    async def one(seed: int) -> Answer:
        answer = Answer()
        async with (
            client_session(timeout=aiohttp.ClientTimeout(total=120)) as http,
            http.post(
                f"{cluster.url}/v1/chat/completions", json={**body, "seed": seed}
            ) as response,
        ):
            assert response.status == 200, await response.text()
            answer.rank = int(response.headers["x-starfish-rank"])
            async for line in response.content:
                name, _, data = line.decode().strip().partition(": ")
                if name == "data" and data != "[DONE]":
                    answer.take(json.loads(data))
                    on_event(answer)
        return answer

    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(one(seed)) for seed in SEEDS]
    return [stream.result() for stream in streams]


async def run_with_kill(
    cluster: Cluster, body: dict[str, Any], is_in_the_middle: Callable[[Answer], bool]
) -> list[Answer]:
    """Kills the rank of the first stream that is in the middle, at that moment."""
    pids = await cluster.wait_live(NUM_RANKS)
    killed: list[int] = []

    def on_event(answer: Answer) -> None:
        if not killed and is_in_the_middle(answer):
            killed.append(answer.rank)
            os.kill(pids[answer.rank], signal.SIGKILL)

    answers = await run(cluster, body, on_event)
    assert killed
    return answers


async def test_a_call_goes_on_after_the_death_of_its_rank(cluster: Cluster) -> None:
    await cluster.wait_live(NUM_RANKS)
    undisturbed = await run(cluster, CALLS, lambda answer: None)
    for answer in undisturbed:
        (call,) = answer.calls
        arguments = json.loads(call["arguments"])
        assert set(arguments) == {"text", "mood"}
        assert 150 <= len(arguments["text"]) <= 200
        assert (answer.finish, answer.content) == ("tool_calls", "")
    disturbed = await run_with_kill(
        cluster, CALLS, lambda answer: bool(answer.calls) and len(answer.calls[0]["arguments"]) > 60
    )
    assert [a.plain() for a in disturbed] == [a.plain() for a in undisturbed]
    assert all(len(answer.call_ids) == 1 for answer in disturbed)


async def test_bad_words_stay_banned_after_the_death_of_a_rank(cluster: Cluster) -> None:
    await cluster.wait_live(NUM_RANKS)
    undisturbed = await run(cluster, LIMITED, lambda answer: None)
    for answer in undisturbed:
        assert not {"the", "fox", "a", "was"} & set(answer.content.split())
    disturbed = await run_with_kill(cluster, LIMITED, lambda answer: len(answer.content) > 80)
    assert [a.plain() for a in disturbed] == [a.plain() for a in undisturbed]
