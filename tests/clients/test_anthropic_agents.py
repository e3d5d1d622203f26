"""Anthropic's Python client as agents use it: calls, their results, more calls, an answer; and
answers with a form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import pytest
from anthropic import beta_tool
from pydantic import BaseModel
from served import COMPARE, QUESTION, STAR_TOOLS, Served, colour, compare, compared, run_tool

TOOLS: Any = [
    {"name": name, "description": name, "input_schema": parameters}
    for name, parameters in STAR_TOOLS.items()
]
STEPS_MAX = 4


class Animal(BaseModel):
    """Without bounds of numbers: the client leaves them out of the schema."""

    kind: Literal["star", "fish"]
    alive: bool


@pytest.fixture
def agent(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.agent_url, api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [None, {"type": "enabled", "budget_tokens": 1024}])
def test_an_agent(agent: anthropic.Anthropic, served: Served, stream: bool, thinking: Any) -> None:
    """Results come the other way round."""
    messages: list[Any] = [{"role": "user", "content": COMPARE}]
    common: Any = {"model": served.scripted_model, "max_tokens": 2000, "tools": TOOLS}
    common |= {} if thinking is None else {"thinking": thinking}
    num_calls = []
    for _ in range(STEPS_MAX):
        if stream:
            with agent.messages.stream(**common, messages=messages) as events:
                answer = events.get_final_message()
        else:
            answer = agent.messages.create(**common, messages=messages)
        calls = [block for block in answer.content if block.type == "tool_use"]
        if answer.stop_reason == "end_turn":
            break
        num_calls.append(len(calls))
        results = [
            {
                "type": "tool_result",
                "tool_use_id": call.id,
                "content": run_tool(call.name, dict(call.input)),
            }
            for call in reversed(calls)
        ]
        messages += [
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": results},
        ]
    assert num_calls == [2, 1]
    text = "".join(block.text for block in answer.content if block.type == "text")
    assert text == compared(thought=thinking is not None)


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_own_agent(agent: anthropic.Anthropic, served: Served, stream: bool) -> None:
    runner = agent.beta.messages.tool_runner(
        model=served.scripted_model,
        max_tokens=2000,
        tools=[beta_tool(colour), beta_tool(compare)],
        messages=[{"role": "user", "content": COMPARE}],
        stream=stream,  # type: ignore[call-overload]
    )
    answer = runner.until_done()
    text = "".join(block.text for block in answer.content if block.type == "text")
    assert text == compared(thought=False)


def test_one_call_at_a_time(agent: anthropic.Anthropic, served: Served) -> None:
    answer = agent.messages.create(
        model=served.scripted_model,
        max_tokens=2000,
        tools=TOOLS,
        messages=[{"role": "user", "content": COMPARE}],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
    )
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert call.input == {"star": "Vega"}


def test_a_parsed_answer(served: Served) -> None:
    with anthropic.Anthropic(base_url=served.url, api_key=served.key, max_retries=0) as client:
        common: Any = {"model": served.model, "max_tokens": 60, "messages": QUESTION}
        parsed = client.messages.parse(**common, output_format=Animal)
        assert isinstance(parsed.parsed_output, Animal)
        with client.messages.stream(**common, output_format=Animal) as stream:
            streamed = stream.get_final_message()
        assert isinstance(streamed.parsed_output, Animal)
