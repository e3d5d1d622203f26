"""Agents over real sockets, with OpenAI's and Anthropic's own clients: calls at once, their results
the other way round, another call, an answer that tells what the model has read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from anthropic import beta_async_tool

from tests.support.agent_model import write_agent_model
from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.vendor_clients import anthropic_client, openai_client

QUESTION = "Compare Vega and Mira."
FOUND = "Vega is white, Mira 🌟 is crimson: white differs from crimson."
PARAMETERS = {"colour": ("star",), "compare": ("first", "second")}
TOOLS: Any = [
    {
        "type": "function",
        "name": tool,
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in names},
            "required": list(names),
        },
    }
    for tool, names in PARAMETERS.items()
]


async def colour(star: str) -> str:
    """The colour of a star."""
    return "white" if star == "Vega" else "crimson"


async def compare(first: str, second: str) -> str:
    """Compares two colours."""
    return f"{first} differs from {second}."


async def results_of(output: Any) -> list[Any]:
    """Of the calls among the items, the other way round."""
    tools = {"colour": colour, "compare": compare}
    calls = [item for item in output if item.type == "function_call"]
    return [
        {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": await tools[call.name](**json.loads(call.arguments)),
        }
        for call in reversed(calls)
    ]


@pytest_asyncio.fixture
async def harness(tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    script_of = write_agent_model(tmp_path)
    async with running_gateway(tmp_path, context_tokens_max=8192) as running:
        for rank in running.ranks:
            rank.script_of = script_of
        yield running


@pytest_asyncio.fixture
async def gpt(harness: GatewayHarness) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai_client(harness) as client:
        yield client


async def test_an_agent_that_names_the_items_of_its_responses(gpt: openai.AsyncOpenAI) -> None:
    given: list[Any] = [{"role": "user", "content": QUESTION}]
    for _ in range(2):
        response = await gpt.responses.create(model=MODEL, input=given, tools=TOOLS)
        given += [{"type": "item_reference", "id": item.id} for item in response.output]
        given += await results_of(response.output)
    async with gpt.responses.stream(model=MODEL, input=given, tools=TOOLS) as stream:
        last = await stream.get_final_response()
    assert last.output_text == f"{FOUND} Two stars."


async def test_an_item_that_is_not_remembered_is_a_404(gpt: openai.AsyncOpenAI) -> None:
    kept = await gpt.responses.create(model=MODEL, input=QUESTION, tools=TOOLS, store=False)
    with pytest.raises(openai.NotFoundError, match="store=false") as caught:
        await gpt.responses.create(
            model=MODEL, input=[{"type": "item_reference", "id": kept.output[0].id}]
        )
    assert (caught.value.code, caught.value.param) == ("item_not_found", "input")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_of_anthropics_client(harness: GatewayHarness, stream: bool) -> None:
    """It would rather have the conversation held, and sends it whole when that is refused."""
    async with anthropic_client(harness) as claude:
        runner = claude.beta.messages.tool_runner(
            model=MODEL,
            max_tokens=2000,
            tools=[beta_async_tool(colour), beta_async_tool(compare)],
            messages=[{"role": "user", "content": QUESTION}],
            thinking={"type": "enabled", "budget_tokens": 1024},
            stream=stream,  # type: ignore[call-overload]
        )
        answer = await runner.until_done()
    texts = [block.text for block in answer.content if block.type == "text"]
    assert texts == [f"{FOUND} Two stars."]
