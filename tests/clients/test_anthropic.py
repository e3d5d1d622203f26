"""Anthropic's Python client, with the Messages API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from served import PARAMETERS, QUESTION, SAID_ARGUMENTS, SAID_REASONING, SAID_TEXT, Served

GROW: Any = {"name": "grow", "description": "Grows arms.", "input_schema": PARAMETERS}


@pytest.fixture
def client(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key=served.key, max_retries=0) as made:
        yield made


@pytest.fixture
def scripted(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.scripted_url, api_key="none", max_retries=0) as made:
        yield made


def test_a_message_says_the_same_whole_and_streamed(
    client: anthropic.Anthropic, served: Served
) -> None:
    common: Any = {"model": served.model, "messages": QUESTION, "max_tokens": 24}
    common["extra_body"] = {"temperature": 0}
    whole = client.messages.create(**common)
    with client.messages.stream(**common) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert [block.type for block in whole.content] == ["text"]
    assert text == whole.content[0].text == streamed.content[0].text  # type: ignore[union-attr]
    assert streamed.stop_reason == whole.stop_reason
    assert 0 < streamed.usage.output_tokens == whole.usage.output_tokens <= 24


def test_tokens_are_counted_as_they_are_billed(client: anthropic.Anthropic, served: Served) -> None:
    counted = client.messages.count_tokens(model=served.model, messages=QUESTION)
    message = client.messages.create(model=served.model, messages=QUESTION, max_tokens=1)
    usage = message.usage
    cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    assert counted.input_tokens == usage.input_tokens + cached


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "grow"}])
def test_a_forced_call_and_its_result(
    client: anthropic.Anthropic, served: Served, choice: Any
) -> None:
    common: Any = {"model": served.model, "max_tokens": 120, "tools": [GROW]}
    message = client.messages.create(**common, messages=QUESTION, tool_choice=choice)
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use"
    assert set(call.input) == set(PARAMETERS["properties"])
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
    history = [
        *QUESTION,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(**common, messages=history).role == "assistant"


def test_thinking_and_a_call_in_a_stream(scripted: anthropic.Anthropic, served: Served) -> None:
    with scripted.messages.stream(
        model=served.scripted_model,
        max_tokens=400,
        messages=QUESTION,
        tools=[GROW],
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:
        kinds = {event.type for event in stream}
        thinking, text, call = stream.get_final_message().content
    assert {"thinking", "text", "input_json", "content_block_stop"} <= kinds
    assert thinking.type == "thinking"
    assert text.type == "text"
    assert call.type == "tool_use"
    assert (thinking.thinking, text.text) == (SAID_REASONING, SAID_TEXT)
    assert call.input == SAID_ARGUMENTS


def test_errors_are_the_clients_own(client: anthropic.Anthropic, served: Served) -> None:
    create = client.messages.create
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(
            model=served.model, messages=QUESTION, max_tokens=4
        )
    with pytest.raises(anthropic.NotFoundError) as missing:
        create(model="claude", messages=QUESTION, max_tokens=4)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError):
        create(model=served.model, messages=QUESTION, max_tokens=0)
    narrow = client.with_options(api_key=served.narrow_key).messages.create
    with served.busy(), pytest.raises(anthropic.RateLimitError) as full:
        narrow(model=served.model, messages=QUESTION, max_tokens=4)
    assert int(full.value.response.headers["retry-after"]) >= 1


def test_a_429_is_retried(client: anthropic.Anthropic, served: Served) -> None:
    patient = client.with_options(api_key=served.narrow_key, max_retries=5)
    with served.busy_until_refused():
        patient.messages.create(model=served.model, messages=QUESTION, max_tokens=4)


def test_who_leaves_ends_the_session(client: anthropic.Anthropic, served: Served) -> None:
    with pytest.raises(anthropic.APITimeoutError):
        client.with_options(timeout=0.02).messages.create(
            model=served.model, messages=QUESTION, max_tokens=1500
        )
    served.wait_idle()
    with client.messages.stream(model=served.model, messages=QUESTION, max_tokens=1500) as stream:
        next(iter(stream))
    served.wait_idle()
