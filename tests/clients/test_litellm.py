"""litellm, which speaks to an OpenAI-compatible server by the prefix `openai/`, and to Anthropic's
API by `anthropic/`."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest
from pydantic import BaseModel, Field
from served import (
    COMPARE,
    GROW,
    PARAMETERS,
    QUESTION,
    SAID_ARGUMENTS,
    SAID_REASONING,
    SAID_TEXT,
    STAR_TOOLS,
    Served,
    compared,
    run_tool,
)


class Arms(BaseModel):
    arms: int = Field(ge=0, le=9)
    alive: bool


def ask(served: Served, **options: Any) -> Any:
    fields = {
        "model": f"openai/{served.model}",
        "api_base": served.api,
        "api_key": served.key,
        "messages": QUESTION,
        "max_tokens": 60,
        "temperature": 0,
        "max_retries": 0,
    }
    return litellm.completion(**{**fields, **options})


def ask_script(served: Served, **options: Any) -> Any:
    model = f"openai/{served.scripted_model}"
    common = {"model": model, "api_base": served.scripted_api, "api_key": "none"}
    return ask(served, **common, tools=[GROW], max_tokens=400, **options)


def test_chat_says_the_same_whole_and_streamed(served: Served) -> None:
    whole = ask(served)
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}))
    streamed = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    text = whole.choices[0].message.content
    assert text
    assert streamed.choices[0].message.content == text
    assert streamed.usage.completion_tokens == whole.usage.completion_tokens > 0


async def test_the_asynchronous_form(served: Served) -> None:
    answer = await litellm.acompletion(
        model=f"openai/{served.model}",
        api_base=served.api,
        api_key=served.key,
        messages=QUESTION,
        max_tokens=8,
    )
    assert answer.choices[0].message.content


def test_completions_and_logprobs(served: Served) -> None:
    text = litellm.text_completion(
        model=f"text-completion-openai/{served.model}",
        api_base=served.api,
        api_key=served.key,
        prompt="Once upon a time",
        max_tokens=8,
    )
    assert text.choices[0].text
    scored = ask(served, logprobs=True, top_logprobs=2, max_tokens=4)
    assert len(scored.choices[0].logprobs.content) == 4


def test_a_forced_call(served: Served) -> None:
    answer = ask(served, tools=[GROW], tool_choice="required", max_tokens=120)
    (call,) = answer.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == set(PARAMETERS["properties"])


def test_a_structured_answer(served: Served) -> None:
    answer = ask(served, response_format=Arms)
    Arms.model_validate_json(answer.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_and_a_call(served: Served, stream: bool) -> None:
    answer = ask_script(served, stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=QUESTION)
    message = answer.choices[0].message
    assert message.content == SAID_TEXT
    assert message.reasoning_content == SAID_REASONING
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == SAID_ARGUMENTS


def test_the_messages_and_the_responses_api(served: Served) -> None:
    message = ask(served, model=f"anthropic/{served.model}", api_base=served.url)
    assert message.choices[0].message.content
    response = litellm.responses(
        model=f"openai/{served.model}",
        api_base=served.api,
        api_key=served.key,
        input="What is a starfish?",
        max_output_tokens=8,
    )
    assert response.output[0].content[0].text


def test_errors_are_the_clients_own(served: Served) -> None:
    with pytest.raises(litellm.AuthenticationError):
        ask(served, api_key="wrong")
    with pytest.raises(litellm.NotFoundError):
        ask(served, model="openai/gpt-unknown")
    with pytest.raises(litellm.BadRequestError):
        ask(served, temperature=9)
    with served.busy(), pytest.raises(litellm.RateLimitError):
        ask(served, api_key=served.narrow_key)


def test_a_429_is_retried(served: Served) -> None:
    with served.busy_until_refused():
        ask(served, api_key=served.narrow_key, max_tokens=4, max_retries=5)


def test_who_leaves_ends_the_session(served: Served) -> None:
    long = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    with pytest.raises(litellm.Timeout):
        ask(served, timeout=0.05, **long)
    served.wait_idle()


@pytest.mark.parametrize(("api", "thought"), [("openai", True), ("anthropic", False)])
def test_an_agent(served: Served, api: str, thought: bool) -> None:
    """Results come the other way round. Through the Messages API thinking is not asked for."""
    messages: list[Any] = [{"role": "user", "content": COMPARE}]
    options: dict[str, Any] = {
        "model": f"{api}/{served.scripted_model}",
        "api_base": served.agent_api if api == "openai" else served.agent_url,
        "api_key": "none",
        "max_tokens": 2000,
        "tools": [
            {"type": "function", "function": {"name": name, "parameters": parameters}}
            for name, parameters in STAR_TOOLS.items()
        ],
    }
    num_calls = []
    for _ in range(4):
        message = ask(served, messages=messages, **options).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        num_calls.append(len(message.tool_calls))
        messages += [
            {
                "role": "tool",
                "tool_call_id": call.id,
                "content": run_tool(call.function.name, json.loads(call.function.arguments)),
            }
            for call in reversed(message.tool_calls)
        ]
    assert num_calls == [2, 1]
    assert message.content == compared(thought=thought)
