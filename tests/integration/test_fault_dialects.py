"""Reasoning and calls across a death, in each API that streams them: a stream whose rank is killed
in the middle of either tells what the undisturbed one tells."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from tests.support.cluster import Cluster, running_cluster
from tests.support.fault_streams import run_streams, run_streams_with_kill

MODEL = Path(__file__).parents[2] / "models" / "starling-14m"
NUM_RANKS = 3
SEEDS = range(4)
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking %}<think>
{% else %}<think>

</think>

{% endif %}{% endif %}"""
"""Qwen3's manner: reasoning begins in the prompt, if it is asked for."""

QUESTION = [{"role": "user", "content": "Tell me a story of a fox."}]
STORY = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "minLength": 120, "maxLength": 160},
        "mood": {"enum": ["sad", "merry"]},
    },
    "required": ["text", "mood"],
    "additionalProperties": False,
}
FUNCTION = {"name": "tell_story", "parameters": STORY}
TOOLS = [{"type": "function", "function": FUNCTION}]
THINKS = {"chat_template_kwargs": {"enable_thinking": True}}
VARIES = (
    *("id", "item_id", "call_id", "created", "created_at", "sequence_number"),
    *("prompt_tokens_details", "input_tokens_details"),
    *("input_tokens", "cache_read_input_tokens"),
)
USAGE = {"stream_options": {"include_usage": True}}


class Stream(NamedTuple):
    """A stream to be disturbed once more than `chars` characters of `kind` have come."""

    path: str
    kind: str
    chars: int
    body: dict[str, Any]


STREAMS = [
    Stream(
        CHAT,
        "reasoning_content",
        100,
        {
            **THINKS,
            **USAGE,
            "messages": QUESTION,
            "thinking_token_budget": 60,
            "max_tokens": 100,
            "ignore_eos": True,
        },
    ),
    Stream(
        CHAT,
        "tool_calls",
        50,
        {
            **THINKS,
            **USAGE,
            "messages": QUESTION,
            "tools": TOOLS,
            "tool_choice": "required",
            "thinking_token_budget": 20,
            "max_tokens": 300,
        },
    ),
    Stream(
        MESSAGES,
        "thinking_delta",
        100,
        {
            "messages": QUESTION,
            "thinking": {"type": "adaptive"},
            "max_tokens": 100,
        },
    ),
    Stream(
        MESSAGES,
        "input_json_delta",
        50,
        {
            "messages": QUESTION,
            "tools": [{"name": "tell_story", "input_schema": STORY}],
            "tool_choice": {"type": "any"},
            "max_tokens": 300,
        },
    ),
    Stream(
        RESPONSES,
        "response.reasoning_text.delta",
        100,
        {
            "input": "Tell me a story of a fox.",
            "reasoning": {"effort": "low"},
            "max_output_tokens": 100,
        },
    ),
    Stream(
        RESPONSES,
        "response.function_call_arguments.delta",
        50,
        {
            "input": "Tell me a story of a fox.",
            "tools": [{"type": "function", **FUNCTION}],
            "tool_choice": "required",
            "max_output_tokens": 300,
        },
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("dialects")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    flags = ("--chat-template", str(template), "--reasoning-parser", "qwen3")
    async with running_cluster(folder / "run", MODEL, ranks=NUM_RANKS, flags=flags) as running:
        yield running


class Told:
    """What a client was told: pieces of one text are put together, for after a death tokens come
    several at a time. Ids and times are left out, and how much of a prompt was cached."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def take(self, event: dict[str, Any]) -> None:
        kind, piece, rest = read(event)
        if not piece:
            self.said.append(("", plain(event)))
        elif self.said and self.said[-1][0] == (kind, rest):
            self.said[-1] = ((kind, rest), self.said[-1][1] + piece)
        else:
            self.said.append(((kind, rest), piece))

    def chars(self, wanted: str) -> int:
        return sum(len(told) for kind, told in self.said if kind and kind[0] == wanted)


def read(event: dict[str, Any]) -> tuple[str, str, str]:
    """The kind of the event's piece of text, the piece, and what it belongs to. No piece: it is an
    event of another kind."""
    delta = event.get("delta")
    if isinstance(delta, str):
        return event["type"], delta, str(event["output_index"])
    if isinstance(delta, dict):
        texts = [delta[key] for key in ("text", "thinking", "partial_json") if key in delta]
        return delta.get("type", ""), "".join(texts), str(event.get("index"))
    for choice in event.get("choices", ()):
        if choice["finish_reason"]:
            continue
        for call in choice["delta"].get("tool_calls", ()):
            return "tool_calls", call["function"]["arguments"], str(call["index"])
        for key in ("reasoning_content", "content"):
            if choice["delta"].get(key):
                return key, choice["delta"][key], ""
    return "", "", ""


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items() if key not in VARIES}
    return [plain(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("wanted", STREAMS, ids=lambda wanted: wanted.kind)
async def test_a_death_in_the_middle_is_not_told(cluster: Cluster, wanted: Stream) -> None:
    def is_in_the_middle(told: Told) -> bool:
        return told.chars(wanted.kind) > wanted.chars

    await cluster.wait_live(NUM_RANKS)
    streams = (cluster, wanted.path, wanted.body, Told, SEEDS)
    undisturbed = await run_streams(*streams)
    assert all(is_in_the_middle(told) for told in undisturbed)
    disturbed = await run_streams_with_kill(
        *streams, num_ranks=NUM_RANKS, is_in_the_middle=is_in_the_middle
    )
    assert [told.said for told in disturbed] == [told.said for told in undisturbed]
