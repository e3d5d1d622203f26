"""Tool calls and bad words across a death: a stream whose rank is killed in the middle of a call's
arguments goes on as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.cluster import Cluster, running_cluster
from tests.support.fault_streams import run_streams, run_streams_with_kill

MODEL = Path(__file__).parents[2] / "models" / "starling-14m"
NUM_RANKS = 3
SEEDS = range(6)
CHAT = "/v1/chat/completions"

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
    "stream_options": {"include_usage": True},
}
LIMITED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a story of a fox."}],
    "bad_words": ["the", "fox", "a", "was"],
    "max_tokens": 64,
    "ignore_eos": True,
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
        self.content = ""
        self.calls: list[dict[str, str]] = []
        self.call_ids: list[str] = []
        self.finish: str | None = None
        self.completion_tokens = 0

    def take(self, event: dict[str, Any]) -> None:
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
    cluster: Cluster, body: dict[str, Any], is_in_the_middle: Callable[[Answer], bool] | None = None
) -> list[Answer]:
    """With a rank killed in the middle, if that is given."""
    if is_in_the_middle is None:
        await cluster.wait_live(NUM_RANKS)
        return await run_streams(cluster, CHAT, body, Answer, SEEDS)
    return await run_streams_with_kill(
        *(cluster, CHAT, body, Answer, SEEDS),
        num_ranks=NUM_RANKS,
        is_in_the_middle=is_in_the_middle,
    )


async def test_a_call_goes_on_after_the_death_of_its_rank(cluster: Cluster) -> None:
    undisturbed = await run(cluster, CALLS)
    for answer in undisturbed:
        (call,) = answer.calls
        arguments = json.loads(call["arguments"])
        assert set(arguments) == {"text", "mood"}
        assert 150 <= len(arguments["text"]) <= 200
        assert (answer.finish, answer.content) == ("tool_calls", "")
    disturbed = await run(
        cluster, CALLS, lambda answer: bool(answer.calls) and len(answer.calls[0]["arguments"]) > 60
    )
    assert [a.plain() for a in disturbed] == [a.plain() for a in undisturbed]
    assert all(len(answer.call_ids) == 1 for answer in disturbed)


async def test_bad_words_stay_banned_after_the_death_of_a_rank(cluster: Cluster) -> None:
    undisturbed = await run(cluster, LIMITED)
    for answer in undisturbed:
        assert not {"the", "fox", "a", "was"} & set(answer.content.split())
    disturbed = await run(cluster, LIMITED, lambda answer: len(answer.content) > 80)
    assert [a.plain() for a in disturbed] == [a.plain() for a in undisturbed]
