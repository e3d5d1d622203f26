"""Tool calls and reasoning over HTTP: what a client is told, whole and streamed, of an answer whose
tokens are known, and what of a request reaches the ranks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from openai.lib.streaming.chat import ChatCompletionStreamState
from tokenizers import Tokenizer

from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import EOS
from tests.support.vendor_clients import openai_client

TEMPLATE = """{%- if tools %}{{ '<tools>' + tools | tojson + '</tools>' }}{% endif %}
{%- for m in messages %}{{ m.role + ':' + m.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% if enable_thinking is defined %}
{%- if enable_thinking %}{{ '<think>' }}{% else %}{{ '<think></think>' }}{% endif %}{% endif %}
{%- endif %}{# <tool_call> #}"""
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
MESSAGES: Any = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln 🌟"}}\n</tool_call>'
TEXT = f"<think>\nRain?\n</think>\n\nLet me look.\n{CALL}\n{CALL}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest_asyncio.fixture
async def harness(model: Path) -> AsyncIterator[GatewayHarness]:
    async with running_gateway(model) as running:
        yield running


def say(harness: GatewayHarness, tokenizer: Tokenizer, text: str) -> int:
    """The ranks answer with this text; returns its number of tokens."""
    ids = [*tokenizer.encode(text).ids, EOS]
    for rank in harness.ranks:
        rank.script = ids
    return len(ids)


async def post(harness: GatewayHarness, **fields: Any) -> tuple[int, dict[str, Any], Any]:
    body = {"model": MODEL, "messages": MESSAGES, **fields}
    async with harness.http.post(harness.url + "/v1/chat/completions", json=body) as response:
        return response.status, await response.json(), response.headers


async def test_an_answer_says_the_same_whole_and_streamed(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    num_tokens = say(harness, tokenizer, TEXT)
    async with openai_client(harness) as api:
        create = api.chat.completions.create
        whole = await create(model=MODEL, messages=MESSAGES, tools=TOOLS, n=2)
        stream = await create(
            model=MODEL,
            messages=MESSAGES,
            tools=TOOLS,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        state = ChatCompletionStreamState()
        async for chunk in stream:
            state.handle_chunk(chunk)
    streamed = state.get_final_completion()
    assert whole.usage is not None
    assert whole.usage == streamed.usage
    assert whole.usage.completion_tokens == 2 * num_tokens
    assert whole.usage.completion_tokens_details is not None
    num_reasoning = len(tokenizer.encode("\nRain?\n").ids)
    assert whole.usage.completion_tokens_details.reasoning_tokens in (
        2 * num_reasoning,
        2 * (num_reasoning + 1),  # the tokenizer may cut "\n</think>" elsewhere
    )
    ids = set()
    for answer in (whole, streamed):
        assert len(answer.choices) == 2
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "Let me look."
            assert choice.message.model_dump()["reasoning_content"] == "Rain?"
            calls = choice.message.tool_calls or []
            assert [c.type for c in calls] == ["function"] * 2
            assert [c.function.name for c in calls] == ["get_weather"] * 2  # type: ignore[union-attr]
            for call in calls:
                assert json.loads(call.function.arguments) == {"city": "Köln 🌟"}  # type: ignore[union-attr]
                ids.add(call.id)
    assert len(ids) == 8


async def test_a_stream_is_made_of_openais_deltas(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    say(harness, tokenizer, CALL)
    body = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    async with harness.http.post(harness.url + "/v1/chat/completions", json=body) as response:
        lines = [line for line in (await response.text()).splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-1] if line.startswith("data: ")]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert events[-1]["choices"] == []
    choices = [event["choices"][0] for event in events[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    (first,) = choices[1]["delta"]["tool_calls"]
    assert first == {
        "index": 0,
        "id": first["id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": ""},
    }
    assert first["id"].startswith("call_")
    parts = [choice["delta"]["tool_calls"][0] for choice in choices[2:-1]]
    assert all(set(part) == {"index", "function"} and part["index"] == 0 for part in parts)
    assert len(parts) > 3
    arguments = "".join(part["function"]["arguments"] for part in parts)
    assert json.loads(arguments) == {"city": "Köln 🌟"}
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "tool_calls")
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


async def test_every_token_of_a_parsed_stream_has_its_logprob_and_id(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    num_tokens = say(harness, tokenizer, TEXT)
    body = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "stream": True}
    body |= {"logprobs": True, "return_token_ids": True}
    ids: list[int] = []
    names: list[str] = []
    async with harness.http.post(harness.url + "/v1/chat/completions", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                ids += choice.get("token_ids") or []
                names += [
                    entry["token"] for entry in (choice["logprobs"] or {"content": []})["content"]
                ]
    assert len(ids) == len(names) == num_tokens
    assert tokenizer.decode(ids) == TEXT


@pytest.mark.parametrize("choice", ["none", None])
async def test_without_tools_a_call_is_content(
    harness: GatewayHarness, tokenizer: Tokenizer, choice: str | None
) -> None:
    say(harness, tokenizer, CALL)
    tools = {"tools": TOOLS, "tool_choice": choice} if choice else {}
    _, answer, _ = await post(harness, **tools)
    assert answer["choices"][0]["message"]["content"] == CALL
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "<tools>" not in tokenizer.decode(list(harness_prompt(harness)))


def harness_prompt(harness: GatewayHarness) -> tuple[int, ...]:
    (submit,) = [submit for rank in harness.ranks for submit in rank.submits]
    return submit.tokens


async def test_parallel_calls_can_be_turned_off(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    say(harness, tokenizer, TEXT)
    _, answer, _ = await post(harness, tools=TOOLS, parallel_tool_calls=False)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


async def test_a_forced_call_goes_before_the_form_of_a_text(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    """Clients send both, with the same schema."""
    say(harness, tokenizer, CALL)
    schema = TOOLS[0]["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "get_weather", "schema": schema}}
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        asked = {"tools": TOOLS, "tool_choice": choice, "seed": 1}
        for fields in (asked, {**asked, "response_format": form}):
            status, body, _ = await post(harness, **fields)
            assert (status, body["choices"][0]["finish_reason"]) == (200, "tool_calls"), body
    sent = [submit.sampling.grammar for rank in harness.ranks for submit in rank.submits]
    assert len(sent) == 4
    assert len(set(sent)) == 1
    assert sent[0]


async def test_a_call_that_is_cut_off_ends_by_length(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    say(harness, tokenizer, CALL)
    num_tokens = len(tokenizer.encode(CALL[: CALL.index("Köln")]).ids)
    _, answer, _ = await post(harness, tools=TOOLS, max_tokens=num_tokens)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"].startswith('{"city": "')


async def test_a_call_goes_on_when_its_rank_dies(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    """The same deltas, and one id a call, although half of them come from another rank."""
    say(harness, tokenizer, TEXT)
    for rank in harness.ranks:
        rank.hold_at = len(tokenizer.encode(TEXT[: TEXT.index("Köln")]).ids)
    async with openai_client(harness) as api:
        stream = await api.chat.completions.create(
            model=MODEL, messages=MESSAGES, tools=TOOLS, stream=True
        )
        state = ChatCompletionStreamState()
        killed = False
        async for chunk in stream:
            state.handle_chunk(chunk)
            if not killed and any(choice.delta.tool_calls for choice in chunk.choices):
                killed = True
                await kill_the_busy_rank(harness)
    (choice,) = state.get_final_completion().choices
    assert choice.message.content == "Let me look."
    calls = choice.message.tool_calls or []
    assert [json.loads(c.function.arguments) for c in calls] == [{"city": "Köln 🌟"}] * 2  # type: ignore[union-attr]


async def kill_the_busy_rank(harness: GatewayHarness) -> None:
    (busy,) = [rank for rank in harness.ranks if rank.submits]
    harness.ranks.remove(busy)
    await busy.kill()
    for rank in harness.ranks:
        rank.go()


@pytest.mark.parametrize(
    ("fields", "prompt_end", "reasoning"),
    [
        ({}, "assistant:", None),
        ({"reasoning_effort": "low"}, "<think>", "Hm."),
        ({"reasoning_effort": "none"}, "<think></think>", None),
        ({"thinking": {"type": "enabled"}}, "<think>", "Hm."),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, "<think></think>", None),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "<think>", "Hm."),
        (
            {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"},
            "<think></think>",
            None,
        ),
    ],
)
async def test_the_prompt_says_whether_an_answer_begins_with_reasoning(
    harness: GatewayHarness,
    tokenizer: Tokenizer,
    fields: dict[str, Any],
    prompt_end: str,
    reasoning: str | None,
) -> None:
    say(harness, tokenizer, "Hm.</think>Yes.")
    status, answer, _ = await post(harness, **fields)
    assert status == 200, answer
    assert tokenizer.decode(list(harness_prompt(harness))).endswith(prompt_end)
    message = answer["choices"][0]["message"]
    assert message.get("reasoning_content") == reasoning
    assert message["content"] == ("Yes." if reasoning else "Hm.</think>Yes.")
    details = answer["usage"].get("completion_tokens_details")
    assert details is None or (details["reasoning_tokens"] > 0) == (reasoning is not None)


async def test_reasoning_can_be_hidden_or_left_in_the_content(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    say(harness, tokenizer, "<think>Hm.</think>Yes.")
    _, hidden, _ = await post(harness, include_reasoning=False)
    assert hidden["choices"][0]["message"]["content"] == "Yes."
    assert "reasoning_content" not in hidden["choices"][0]["message"]
    assert hidden["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    _, joined, _ = await post(harness, separate_reasoning=False)
    assert joined["choices"][0]["message"]["content"] == "<think>Hm.</think>Yes."


async def test_limits_of_tokens_reach_the_ranks(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    say(harness, tokenizer, "Yes.")
    await post(
        harness,
        bad_words=["arm"],
        allowed_token_ids=[9, 7, 9],
        thinking_token_budget=5,
        chat_template_kwargs={"enable_thinking": True},
    )
    (submit,) = [submit for rank in harness.ranks for submit in rank.submits]
    sampling = submit.sampling
    assert {tokenizer.decode(list(word)) for word in sampling.bad_words} == {"arm", " arm"}
    assert sampling.allowed_token_ids == (7, 9)
    budget = sampling.thinking_budget
    assert budget is not None
    assert (budget.tokens, budget.opened) == (5, True)
    assert tokenizer.decode(list(budget.forced_ids)) == "</think>"


@pytest.mark.parametrize("keeps", ["left", "right"])
async def test_long_prompts_are_truncated_when_asked(
    harness: GatewayHarness, tokenizer: Tokenizer, keeps: str
) -> None:
    say(harness, tokenizer, "Yes.")
    status, answer, _ = await post(
        harness,
        messages=[{"role": "user", "content": "starfish " * 5000}],
        truncate_prompt_tokens=20,
        truncation_side=keeps,
    )
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == 20
    prompt = tokenizer.decode(list(harness_prompt(harness)))
    assert prompt.endswith("assistant:") == (keeps == "left")
    assert prompt.startswith("user:") == (keeps == "right")


async def test_what_fits_is_kept_with_minus_one(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    say(harness, tokenizer, "Yes.")
    async with harness.http.post(
        harness.url + "/v1/completions",
        json={"prompt": "starfish " * 5000, "truncate_prompt_tokens": -1, "max_tokens": 8},
    ) as response:
        usage = (await response.json())["usage"]
    assert usage["prompt_tokens"] == 2048 - 8


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"thinking": {"type": "sometimes"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking"),
        ({"thinking": True}, "thinking"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 9999}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": ["x"] * 1000}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [420]}, "allowed_token_ids"),
        ({"allowed_token_ids": [5], "guided_regex": "a"}, "allowed_token_ids"),
        ({"chat_template": "x"}, "chat_template"),
        ({"functions": [{"name": "f"}]}, "functions"),
        (
            {"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"},
            "tool_choice",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"a": 7}}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
async def test_what_cannot_be_is_a_400_that_names_the_field(
    harness: GatewayHarness, fields: dict[str, Any], param: str
) -> None:
    status, answer, _ = await post(harness, **fields)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "schema",
    [
        json.loads('{"properties": {"a": ' + '{"items": ' * 300 + "{}" + "}" * 300 + "}}"),
        {"properties": {"a": {"$ref": "#"}}, "$ref": "#"},
    ],
    ids=["depth", "itself"],
)
async def test_hostile_schemas_are_refused(harness: GatewayHarness, schema: Any) -> None:
    function = {"name": "f", "parameters": {"type": "object", **schema}}
    tools = [{"type": "function", "function": function}]
    status, answer, _ = await post(harness, tools=tools, tool_choice="required")
    assert (status, answer["error"]["param"]) == (400, "tools")


async def test_what_is_wrong_with_a_schema_is_said_without_our_grammar(
    harness: GatewayHarness,
) -> None:
    function = {"name": "f", "parameters": {"type": "object", "required": 5}}
    tools = [{"type": "function", "function": function}]
    _, answer, _ = await post(harness, tools=tools, tool_choice="required")
    assert answer["error"]["message"] == (
        "tools is not a usable grammar: Expected array for 'required', got 5"
    )


async def test_unknown_fields_are_named_in_a_header(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    say(harness, tokenizer, "Yes.")
    _, _, headers = await post(harness, temprature=0, user="u")
    assert headers["X-Starfish-Ignored-Fields"] == "temprature"
    _, _, headers = await post(harness, user="u")
    assert "X-Starfish-Ignored-Fields" not in headers


async def test_a_model_without_reasoning_refuses_what_is_about_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    async with running_gateway(tmp_path, tool_call_parser="none") as harness:
        for fields, param in (
            ({"reasoning_effort": "low"}, "reasoning_effort"),
            ({"thinking": {"type": "disabled"}}, "thinking"),
            ({"thinking_token_budget": 5}, "thinking_token_budget"),
            ({"tools": TOOLS}, "tools"),
        ):
            status, answer, _ = await post(harness, **fields)
            assert (status, answer["error"]["param"]) == (400, param)


async def test_tools_reach_a_model_whose_template_knows_none(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    async with running_gateway(tmp_path) as harness:
        say(harness, tokenizer, CALL)
        _, answer, _ = await post(harness, tools=TOOLS)
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        prompt = tokenizer.decode(list(harness_prompt(harness)), skip_special_tokens=False)
        assert prompt.startswith("<|begin|>system\n# Tools")
        assert json.dumps(TOOLS[0]) in prompt


async def test_parsers_can_be_chosen(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    async with running_gateway(
        tmp_path, tool_call_parser="mistral", reasoning_parser="deepseek_r1"
    ) as harness:
        say(harness, tokenizer, 'Hm.</think>[TOOL_CALLS][{"name": "f", "arguments": {}}]')
        _, answer, _ = await post(harness, tools=TOOLS)
        message = answer["choices"][0]["message"]
        assert message["reasoning_content"] == "Hm."
        (call,) = message["tool_calls"]
        assert call["function"] == {"name": "f", "arguments": "{}"}
        assert call["id"].isalnum()
        assert len(call["id"]) == 9
