"""OpenAI's own Python client as agents use it: calls, their results, more calls, an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import COMPARE, PARAMETERS, QUESTION, STAR_TOOLS, Served, compared, run_tool

FUNCTIONS: Any = [
    {"type": "function", "name": name, "description": name, "parameters": parameters}
    for name, parameters in STAR_TOOLS.items()
]
TOOLS: Any = [
    {"type": "function", "function": {k: v for k, v in each.items() if k != "type"}}
    for each in FUNCTIONS
]
STEPS_MAX = 4


@pytest.fixture
def agent(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.agent_api, api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_an_agent_with_chats(
    agent: openai.OpenAI, served: Served, stream: bool, in_order: bool
) -> None:
    """`in_order`: results come in the order of the calls, or the other way round."""
    messages: list[Any] = [{"role": "user", "content": COMPARE}]
    common: Any = {"model": served.scripted_model, "messages": messages, "tools": TOOLS}
    num_calls = []
    for _ in range(STEPS_MAX):
        if stream:
            with agent.chat.completions.stream(**common) as events:
                (choice,) = events.get_final_completion().choices
        else:
            (choice,) = agent.chat.completions.create(**common).choices
        messages.append(choice.message)
        calls = choice.message.tool_calls or []
        if choice.finish_reason == "stop":
            break
        num_calls.append(len(calls))
        results = [
            {
                "role": "tool",
                "tool_call_id": call.id,
                "content": run_tool(call.function.name, json.loads(call.function.arguments)),
            }
            for call in calls
        ]
        messages += results if in_order else results[::-1]
    assert num_calls == [2, 1]
    assert choice.message.content == compared(thought=True)


@pytest.mark.parametrize("history", ["previous", "items", "references"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_with_responses(
    agent: openai.OpenAI, served: Served, history: str, stream: bool
) -> None:
    """`history`: the response before is named, or its items are, or they are sent again."""
    given: list[Any] = [{"role": "user", "content": COMPARE}]
    common: Any = {"model": served.scripted_model, "tools": FUNCTIONS}
    num_calls = []
    for _ in range(STEPS_MAX):
        request = {**common, "input": given, "store": history != "items"}
        if stream:
            with agent.responses.stream(**request) as events:
                response = events.get_final_response()
        else:
            response = agent.responses.create(**request)
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        num_calls.append(len(calls))
        match history:
            case "previous":
                common["previous_response_id"] = response.id
                given = []
            case "items":
                given += [item.model_dump(exclude_none=True) for item in response.output]
            case "references":
                given += [{"type": "item_reference", "id": item.id} for item in response.output]
        given += [
            {
                "type": "function_call_output",
                "call_id": call.call_id,
                "output": run_tool(call.name, json.loads(call.arguments)),
            }
            for call in reversed(calls)
        ]
    assert num_calls == [2, 1]
    assert response.output_text == compared(thought=True)


def test_one_call_at_a_time(agent: openai.OpenAI, served: Served) -> None:
    answer = agent.chat.completions.create(
        model=served.scripted_model,
        messages=[{"role": "user", "content": COMPARE}],
        tools=TOOLS,
        parallel_tool_calls=False,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"star": "Vega"}


def test_forced_calls_at_once(served: Served) -> None:
    grow = {"type": "function", "function": {"name": "grow", "parameters": PARAMETERS}}
    with openai.OpenAI(base_url=served.api, api_key=served.key, max_retries=0) as client:
        answer = client.chat.completions.create(
            model=served.model,
            messages=QUESTION,
            tools=[grow],
            tool_choice="required",
            parallel_tool_calls=True,
            max_tokens=1500,
            temperature=0,
        )
    calls = answer.choices[0].message.tool_calls or []
    assert 1 <= len({call.id for call in calls}) == len(calls) <= 16
    for call in calls:
        assert set(json.loads(call.function.arguments)) == set(PARAMETERS["properties"])
