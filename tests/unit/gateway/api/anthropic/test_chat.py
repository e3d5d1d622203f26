"""Requests of the Messages API as chats."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from anthropic.types.beta.message_create_params import (
    MessageCreateParamsBase as BetaMessageCreateParams,
)
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase
from anthropic.types.output_config_param import OutputConfigParam
from anthropic.types.thinking_config_adaptive_param import ThinkingConfigAdaptiveParam
from anthropic.types.thinking_config_enabled_param import ThinkingConfigEnabledParam

from gateway.api.anthropic.bodies import CountBody, MessagesBody, OutputConfig, Thinking
from gateway.api.anthropic.chat import chat_fields
from gateway.api.bodies import ChatBody
from gateway.api.tools import ToolMode, read_tools
from shared.errors import RequestError


def chat_of(**fields: Any) -> dict[str, Any]:
    plain = {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}
    return chat_fields(msgspec.convert(plain, MessagesBody))


def messages_of(*messages: Any, **fields: Any) -> list[dict[str, Any]]:
    messages_: list[dict[str, Any]] = chat_of(messages=list(messages), **fields)["messages"]
    return messages_


def test_texts_and_the_system_prompt() -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages_of(
        {"role": "user", "content": blocks},
        {"role": "assistant", "content": "c"},
        system=[{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}],
    ) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


def test_a_turn_with_thinking_and_calls_and_their_results() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}
    said = [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "wait"},
        call,
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "7"}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
        {"type": "text", "text": "so?"},
    ]
    assert messages_of(
        {"role": "assistant", "content": said}, {"role": "user", "content": results}
    ) == [
        {
            "role": "assistant",
            "content": "wait",
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"x":1}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "7"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "user", "content": "so?"},
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, {}),
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"type": "tool", "name": "f"},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
    ],
)
def test_tools_and_their_choice(choice: Any, expected: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    tool = {"name": "f", "description": "does f", "input_schema": schema}
    chat = chat_of(tools=[tool], tool_choice=choice)
    function = {"name": "f", "description": "does f", "parameters": schema}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert {
        name: chat[name] for name in chat if name in ("tool_choice", "parallel_tool_calls")
    } == (expected)


def test_a_choice_of_tools_needs_tools() -> None:
    for tools in ({}, {"tools": []}):
        for kind in ({"type": "any"}, {"type": "tool", "name": "f"}):
            chat = msgspec.convert(chat_of(**tools, tool_choice=kind), ChatBody)
            with pytest.raises(RequestError) as caught:
                read_tools(chat)
            assert caught.value.param == "tool_choice"
        for kind in ({"type": "auto"}, {"type": "none"}):
            chat = msgspec.convert(chat_of(**tools, tool_choice=kind), ChatBody)
            assert read_tools(chat).mode is ToolMode.NONE


def test_thinking_is_off_unless_it_is_asked_for() -> None:
    assert chat_of()["include_reasoning"] is False
    assert chat_of()["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    chat = chat_of(thinking={"type": "enabled", "budget_tokens": 1024})
    assert chat["include_reasoning"] is True
    assert chat["thinking_token_budget"] == 1024
    assert chat["chat_template_kwargs"]["enable_thinking"] is True


def test_sampling() -> None:
    chat = chat_of(temperature=0.5, top_k=3, stop_sequences=["x"], stream=True)
    assert (chat["temperature"], chat["top_k"], chat["stop"], chat["stream"]) == (
        0.5,
        3,
        ["x"],
        True,
    )
    assert "top_p" not in chat


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": 1}]}]},
            "messages",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        (
            {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "x"}},
            "tool_choice",
        ),
        ({"thinking": {"type": "enable"}}, "thinking"),
    ],
)
def test_what_cannot_be_done_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat_of(**fields)
    assert caught.value.param == param


USER = {"role": "user", "content": "hi"}


def test_a_begun_answer_is_gone_on_with() -> None:
    begun = {"role": "assistant", "content": [{"type": "text", "text": "Once"}]}
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    called = {"role": "assistant", "content": [{"type": "text", "text": "wait"}, call]}
    assert chat_of(messages=[USER, begun])["continue_final_message"] is True
    for messages in ([USER], [USER, begun, USER], [USER, called]):
        assert "continue_final_message" not in chat_of(messages=messages)


def test_the_form_of_the_output_is_a_response_format() -> None:
    schema = {"type": "object"}
    form = {"type": "json_schema", "schema": schema}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert chat_of(output_config={"format": form})["response_format"] == wanted
    assert chat_of(output_format=form)["response_format"] == wanted
    assert "response_format" not in chat_of(output_config={"effort": "low"})


@pytest.mark.parametrize(
    "fields",
    [
        {"container": "c"},
        {"mcp_servers": [{"url": "https://example.com"}]},
        {"thread": {"type": "create"}},
        {"thread": {"type": "continue", "previous_message_id": "msg_1"}},
        {"compaction": {"type": "summarize"}},
        {"output_config": {"format": {"type": "xml"}}},
        {"output_format": {"type": "json_schema"}},
        {"output_config": {"effort": "enormous"}},
        {"thinking": {"type": "enabled", "display": "sung"}},
    ],
)
def test_what_would_change_the_answer_and_is_not_here_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        chat_of(**fields)
    assert refused.value.param == next(iter(fields))


def test_the_effort_is_a_variable_of_the_template() -> None:
    variables = chat_of(output_config={"effort": "high"})["chat_template_kwargs"]
    assert variables["reasoning_effort"] == "high"
    assert "reasoning_effort" not in chat_of()["chat_template_kwargs"]


@pytest.mark.parametrize(
    ("thinking", "shows"),
    [
        ({"type": "adaptive"}, True),
        ({"type": "enabled", "display": "summarized"}, True),
        ({"type": "enabled", "display": "omitted"}, False),
        ({"type": "disabled"}, False),
    ],
)
def test_thinking_is_shown_unless_it_is_to_be_omitted(
    thinking: dict[str, str], shows: bool
) -> None:
    assert chat_of(thinking=thinking)["include_reasoning"] is shows


@pytest.mark.parametrize(
    ("body", "theirs"),
    [
        (MessagesBody, MessageCreateParamsBase),
        (CountBody, MessageCountTokensParams),
        (OutputConfig, OutputConfigParam),
        (Thinking, ThinkingConfigAdaptiveParam),
        (Thinking, ThinkingConfigEnabledParam),
    ],
)
def test_every_field_of_the_api_is_known(body: type[msgspec.Struct], theirs: type) -> None:
    assert set(theirs.__annotations__) - {"stream"} <= set(body.__struct_fields__)


def test_the_fields_of_the_clients_agents_are_known() -> None:
    """Their API is a draft of the next one."""
    elsewhere = {"stream", "betas"}
    assert set(BetaMessageCreateParams.__annotations__) - elsewhere <= set(
        MessagesBody.__struct_fields__
    )


@pytest.mark.parametrize(
    "management",
    [
        None,
        {},
        {"edits": []},
        {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    ],
)
def test_a_context_of_which_all_is_kept_is_as_without(management: dict[str, Any] | None) -> None:
    assert chat_of(context_management=management) == chat_of()


@pytest.mark.parametrize(
    "edits",
    [
        [{"type": "clear_tool_uses_20250919"}],
        [{"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": 1}}],
        [{"type": "clear_thinking_20251015", "keep": "all"}, {"type": "compact_20260112"}],
        ["all"],
        {"keep": "all"},
    ],
)
def test_what_would_clear_a_part_of_the_context_is_refused(edits: object) -> None:
    with pytest.raises(RequestError, match="nothing is cleared") as caught:
        chat_of(context_management={"edits": edits})
    assert caught.value.param == "context_management"
