"""OpenAI's own Python client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel, Field
from served import (
    GROW,
    PARAMETERS,
    QUESTION,
    SAID_ARGUMENTS,
    SAID_REASONING,
    SAID_TEXT,
    Served,
)


class Arms(BaseModel):
    arms: int = Field(ge=0, le=9)
    alive: bool


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.api, api_key=served.key, max_retries=0) as made:
        yield made


@pytest.fixture
def scripted(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.scripted_api, api_key="none", max_retries=0) as made:
        yield made


def test_chat_says_the_same_whole_and_streamed(client: openai.OpenAI, served: Served) -> None:
    create = client.chat.completions.create
    common = {"model": served.model, "messages": QUESTION, "max_tokens": 24, "seed": 7}
    whole = create(**common)
    state = ChatCompletionStreamState()
    for chunk in create(**common, stream=True, stream_options={"include_usage": True}):
        state.handle_chunk(chunk)
    streamed = state.current_completion_snapshot
    assert whole.choices[0].message.content
    assert streamed.choices[0].message.content == whole.choices[0].message.content
    assert whole.usage is not None
    assert streamed.usage is not None
    assert streamed.usage.completion_tokens == whole.usage.completion_tokens
    assert 0 < whole.usage.completion_tokens <= 24


def test_completions_and_logprobs(client: openai.OpenAI, served: Served) -> None:
    text = client.completions.create(
        model=served.model, prompt="Once upon a time", max_tokens=4, logprobs=2
    )
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == text.choices[0].text
    chat = client.chat.completions.create(
        model=served.model, messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert [len(entry.top_logprobs) for entry in content.content or []] == [3] * 4


def test_a_parsed_answer(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.parse(
        model=served.model, messages=QUESTION, max_tokens=60, response_format=Arms
    )
    assert isinstance(answer.choices[0].message.parsed, Arms)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "grow"}}])
def test_a_forced_call(client: openai.OpenAI, served: Served, choice: object) -> None:
    common = {"model": served.model, "messages": QUESTION, "tools": [GROW], "max_tokens": 100}
    answer = client.chat.completions.create(**common, tool_choice=choice, temperature=0)
    (call,) = answer.choices[0].message.tool_calls or []
    assert set(json.loads(call.function.arguments)) == set(PARAMETERS["properties"])
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    messages = [*QUESTION, answer.choices[0].message, result]
    after = client.chat.completions.create(**{**common, "messages": messages})
    assert after.choices[0].message.role == "assistant"


def test_a_streamed_call_with_reasoning(scripted: openai.OpenAI, served: Served) -> None:
    with scripted.chat.completions.stream(
        model=served.scripted_model, messages=QUESTION, tools=[GROW]
    ) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"content.delta", "tool_calls.function.arguments.delta"} <= kinds
    assert message.content == SAID_TEXT
    assert message.model_dump()["reasoning_content"] == SAID_REASONING
    (call,) = message.tool_calls or []
    assert json.loads(call.function.arguments) == SAID_ARGUMENTS


def test_responses(client: openai.OpenAI, scripted: openai.OpenAI, served: Served) -> None:
    first = client.responses.create(
        model=served.model, input="What is a starfish?", max_output_tokens=16
    )
    assert first.output_text
    second = client.responses.create(
        model=served.model,
        input="And then?",
        previous_response_id=first.id,
        max_output_tokens=8,
        store=False,
    )
    assert second.previous_response_id == first.id
    parsed = client.responses.parse(
        model=served.model, input="An arm?", text_format=Arms, max_output_tokens=60
    )
    assert isinstance(parsed.output_parsed, Arms)
    tool = {"type": "function", **GROW["function"], "strict": True}
    with scripted.responses.stream(
        model=served.scripted_model, input="Grow.", tools=[tool]
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    (call,) = [item for item in final.output if item.type == "function_call"]
    assert json.loads(call.arguments) == SAID_ARGUMENTS
    assert final.output_text == SAID_TEXT


def test_models_and_what_is_not_served(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == [served.model]
    assert client.models.retrieve(served.model).id == served.model
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model=served.model, input="x")


def test_errors_are_the_clients_own(client: openai.OpenAI, served: Served) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.AuthenticationError) as unknown:
        client.with_options(api_key="wrong").models.list()
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-4o", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        create(model=served.model, messages=QUESTION, temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.request_id
    narrow = client.with_options(api_key=served.narrow_key).chat.completions.create
    with served.busy(), pytest.raises(openai.RateLimitError) as full:
        narrow(model=served.model, messages=QUESTION, max_tokens=4)
    assert full.value.code == "rate_limit_exceeded"
    assert int(full.value.response.headers["retry-after"]) >= 1


def test_a_429_is_retried(client: openai.OpenAI, served: Served) -> None:
    patient = client.with_options(api_key=served.narrow_key, max_retries=5)
    with served.busy_until_refused():
        patient.chat.completions.create(model=served.model, messages=QUESTION, max_tokens=4)


def test_a_timeout_ends_the_session(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(
            model=served.model,
            prompt="Once",
            max_tokens=1500,
            extra_body={"ignore_eos": True},
        )
    served.wait_idle()


def test_a_stream_that_is_closed_ends_its_session(client: openai.OpenAI, served: Served) -> None:
    with client.completions.create(
        model=served.model,
        prompt="Once",
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        next(iter(stream))
    served.wait_idle()


async def test_a_cancelled_task_ends_its_session(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=served.api, api_key=served.key) as client:
        task = asyncio.create_task(
            client.completions.create(
                model=served.model,
                prompt="Once",
                max_tokens=1500,
                extra_body={"ignore_eos": True},
            )
        )
        await asyncio.to_thread(served.wait_busy)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.to_thread(served.wait_idle)
