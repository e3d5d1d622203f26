"""The Messages and the Responses API over real sockets, as Anthropic's and OpenAI's own clients use
them, also while a rank dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import openai
import pytest
import pytest_asyncio
from anthropic.types import MessageParam, ToolParam
from tokenizers import Tokenizer

from tests.support.authentication import api_key
from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import EOS, VOCAB
from tests.support.vendor_clients import anthropic_client, openai_client

SAID = (
    '<think>hm\n</think>\n\nhi<tool_call>\n{"name": "grow", "arguments": {"arms": 5}}\n</tool_call>'
)
QUESTION: list[MessageParam] = [{"role": "user", "content": "What is a starfish?"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"arms": {"type": "integer"}}}
GROW: ToolParam = {"name": "grow", "description": "grows arms", "input_schema": SCHEMA}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest_asyncio.fixture
async def harness(model: Path, tokenizer: Tokenizer) -> AsyncIterator[GatewayHarness]:
    options = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    async with running_gateway(model, **options) as running:
        for rank in running.ranks:
            rank.script = [*tokenizer.encode(SAID).ids, EOS]
        yield running


@pytest_asyncio.fixture
async def claude(harness: GatewayHarness) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic_client(harness) as client:
        yield client


@pytest_asyncio.fixture
async def gpt(harness: GatewayHarness) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai_client(harness) as client:
        yield client


async def test_a_message_with_thinking_and_a_call(claude: anthropic.AsyncAnthropic) -> None:
    message = await claude.messages.create(
        model=MODEL,
        max_tokens=200,
        messages=QUESTION,
        tools=[GROW],
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    plain = [
        block.model_dump(include={"type", "thinking", "text", "name", "input"})
        for block in message.content
    ]
    assert plain == [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "hi"},
        {"type": "tool_use", "name": "grow", "input": {"arms": 5}},
    ]
    assert message.stop_reason == "tool_use"
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0


async def test_thinking_that_was_not_asked_for_is_not_shown(
    claude: anthropic.AsyncAnthropic,
) -> None:
    message = await claude.messages.create(model=MODEL, max_tokens=200, messages=QUESTION)
    assert [block.type for block in message.content] == ["text"]
    assert message.stop_reason == "end_turn"


async def test_a_streamed_message_goes_on_after_a_death(
    harness: GatewayHarness, claude: anthropic.AsyncAnthropic
) -> None:
    for rank in harness.ranks:
        rank.hold_at = 20
    async with claude.messages.stream(
        model=MODEL, max_tokens=200, messages=QUESTION, tools=[GROW]
    ) as stream:
        await anext(aiter(stream))
        first = next(rank for rank in harness.ranks if rank.submits)
        await first.kill()
        for rank in harness.ranks:
            rank.go()
        message = await stream.get_final_message()
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert message.content[1].model_dump()["input"] == {"arms": 5}
    assert sum(len(rank.submits) for rank in harness.ranks) == 2


async def test_a_stop_sequence_is_named(claude: anthropic.AsyncAnthropic) -> None:
    message = await claude.messages.create(
        model=MODEL, max_tokens=200, messages=QUESTION, stop_sequences=["ZZ", "hm"]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "hm")


async def test_tokens_are_counted(claude: anthropic.AsyncAnthropic) -> None:
    counted = await claude.messages.count_tokens(model=MODEL, messages=QUESTION)
    message = await claude.messages.create(model=MODEL, max_tokens=1, messages=QUESTION)
    assert counted.input_tokens == message.usage.input_tokens
    assert message.stop_reason == "max_tokens"


async def test_errors_are_those_that_anthropics_client_knows(
    claude: anthropic.AsyncAnthropic,
) -> None:
    with pytest.raises(anthropic.NotFoundError):
        await claude.messages.create(model="other", max_tokens=9, messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError) as caught:
        await claude.messages.create(model=MODEL, max_tokens=9, messages=[])
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["request_id"]


async def test_a_response_and_the_one_that_follows_it(
    harness: GatewayHarness, gpt: openai.AsyncOpenAI
) -> None:
    first = await gpt.responses.create(
        model=MODEL,
        input="What is a starfish?",
        instructions="be brief",
        tools=[{"type": "function", "name": "grow", "parameters": SCHEMA, "strict": False}],
    )
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    assert first.output_text == "hi"
    call = first.output[2].model_dump()
    assert (call["name"], call["arguments"]) == ("grow", '{"arms": 5}')
    assert first.usage is not None
    assert first.usage.output_tokens_details.reasoning_tokens > 0
    second = await gpt.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call["call_id"], "output": "done"}],
    )
    assert second.previous_response_id == first.id
    prompts = [len(submit.tokens) for rank in harness.ranks for submit in rank.submits]
    assert max(prompts) > min(prompts)
    assert (await gpt.responses.retrieve(first.id)).id == first.id
    await gpt.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await gpt.responses.retrieve(first.id)


async def test_a_response_that_is_not_to_be_stored_is_forgotten(gpt: openai.AsyncOpenAI) -> None:
    response = await gpt.responses.create(model=MODEL, input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        await gpt.responses.create(model=MODEL, input="y", previous_response_id=response.id)


async def test_a_streamed_response_goes_on_after_a_death(
    harness: GatewayHarness, gpt: openai.AsyncOpenAI
) -> None:
    for rank in harness.ranks:
        rank.hold_at = 20
    async with gpt.responses.stream(
        model=MODEL,
        input="What is a starfish?",
        tools=[{"type": "function", "name": "grow", "parameters": SCHEMA, "strict": False}],
    ) as stream:
        await anext(aiter(stream))
        first = next(rank for rank in harness.ranks if rank.submits)
        await first.kill()
        for rank in harness.ranks:
            rank.go()
        final = await stream.get_final_response()
    assert final.output_text == "hi"
    assert final.status == "completed"
    assert sum(len(rank.submits) for rank in harness.ranks) == 2


async def test_a_stream_whose_rank_is_lost_for_good_fails_with_a_reason(model: Path) -> None:
    async with running_gateway(model, num_ranks=1, no_rank_timeout_s=0.5) as harness:
        harness.ranks[0].hold_at = 3
        async with openai.AsyncOpenAI(base_url=harness.url + "/v1", api_key=api_key()) as client:
            stream = await client.responses.create(model=MODEL, input="x", stream=True)
            events = []
            async for event in stream:
                events.append(event)
                if event.type == "response.in_progress":
                    await harness.ranks[0].kill()
                    await asyncio.sleep(0)
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None


async def test_a_chat_is_tokenised_as_it_is_answered(
    harness: GatewayHarness, gpt: openai.AsyncOpenAI
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "grow", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "grow", "parameters": SCHEMA}}
    chat: dict[str, Any] = {
        "messages": [
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "done"},
        ],
        "tools": [tool],
    }
    answer = await gpt.chat.completions.create(
        model=MODEL, max_tokens=1, extra_body={"return_token_ids": True}, **chat
    )
    async with harness.http.post(harness.url + "/tokenize", json=chat) as response:
        tokens = (await response.json())["tokens"]
    assert tokens == answer.choices[0].model_dump()["prompt_token_ids"]


async def generate(harness: GatewayHarness, **fields: Any) -> tuple[int, Any]:
    async with harness.http.post(harness.url + "/generate", json=fields) as response:
        return response.status, await response.json()


async def test_sglang_generates(harness: GatewayHarness, tokenizer: Tokenizer) -> None:
    script, prompt = tokenizer.encode(SAID).ids, tokenizer.encode("a reef").ids
    status, whole = await generate(harness, text="a reef", sampling_params={"temperature": 0})
    assert (status, whole["text"], whole["output_ids"]) == (200, SAID, [*script, EOS])
    about = whole["meta_info"]
    assert about.pop("id")
    assert about == {
        "finish_reason": {"type": "stop", "matched": EOS},
        "prompt_tokens": len(prompt),
        "completion_tokens": len(script) + 1,
        "cached_tokens": 0,
    }
    _, (one, two) = await generate(
        harness, input_ids=[prompt, prompt], sampling_params={"max_new_tokens": 3}
    )
    assert one["output_ids"] == two["output_ids"] == script[:3]
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    _, stopped = await generate(harness, text="x", sampling_params={"stop": "hm"})
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": "hm"}


async def test_an_event_of_sglangs_stream_has_the_whole_text_so_far(
    harness: GatewayHarness,
) -> None:
    body = {"text": "a reef", "stream": True, "sampling_params": {"max_new_tokens": 5}}
    events: list[dict[str, Any]] = []
    async with harness.http.post(harness.url + "/generate", json=body) as response:
        lines = (await response.read()).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [msgspec.json.decode(line.removeprefix("data: ")) for line in lines[:-2]]
    assert all(b["text"].startswith(a["text"]) for a, b in pairwise(events))
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (
        len(events) - 1
    )
    whole = (await generate(harness, **{**body, "stream": False}))[1]
    del whole["meta_info"]["id"], events[-1]["meta_info"]["id"]
    assert events[-1] == whole


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text": "a", "input_ids": [5]},
        {"text": "a", "return_logprob": True},
        {"text": "a", "lora_path": "x"},
        {"text": "a", "sampling_params": {"max_tokens": 5}},
        {"text": "a", "sampling_params": {"max_new_tokens": -1}},
        {"text": "a", "sampling_params": {"stop_regex": "x"}},
        {"text": "a", "sampling_params": {"regex": "("}},
        {"text": "a", "sampling_params": {"json_schema": '{"$ref": "#"}'}},
        {"input_ids": [VOCAB]},
    ],
)
async def test_sglangs_generate_refuses_what_is_not_served(
    harness: GatewayHarness, fields: dict[str, Any]
) -> None:
    status, body = await generate(harness, **fields)
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
        ("/generate", {"text": "a", "sampling_params": {"regex": "("}}, "regex"),
        ("/v1/responses", {"input": "a", "max_output_tokens": -1}, "max_output_tokens"),
    ],
)
async def test_an_error_names_the_field_that_was_sent(
    harness: GatewayHarness, path: str, body: dict[str, Any], param: str
) -> None:
    async with harness.http.post(harness.url + path, json=body) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, param)
    assert error["message"].startswith(param)


async def test_sglangs_stream_goes_on_after_a_death(harness: GatewayHarness) -> None:
    for rank in harness.ranks:
        rank.hold_at = 20
    body = {"text": "a reef", "stream": True}
    async with harness.http.post(harness.url + "/generate", json=body) as response:
        begin = await response.content.readuntil(b"\n\n")
        first = next(rank for rank in harness.ranks if rank.submits)
        await first.kill()
        for rank in harness.ranks:
            rank.go()
        events = (begin + await response.read()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert msgspec.json.decode(events[-3].removeprefix("data: "))["text"] == SAID
    assert sum(len(rank.submits) for rank in harness.ranks) == 2
