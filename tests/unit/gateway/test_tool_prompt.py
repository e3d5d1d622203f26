"""Tools, calls and results as texts, for models whose chat template knows none."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.tool_prompt import with_all_fields, with_tools
from shared.errors import RequestError

TOOL = {"type": "function", "function": {"name": "wetter", "description": "Für Köln"}}
USER = {"role": "user", "content": "hi"}


def test_tools_come_into_a_system_message_of_their_own() -> None:
    system, user = with_tools([USER], [TOOL, TOOL])
    assert user == USER
    assert system["role"] == "system"
    assert system["content"].count('"description": "Für Köln"') == 2
    assert '{"name": <function-name>, "arguments": <args-json-object>}' in system["content"]


def test_tools_follow_the_system_message_that_is_there() -> None:
    parts: Any = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    for content in ("Be kind.", parts):
        system, _ = with_tools([{"role": "system", "content": content, "name": "n"}, USER], [TOOL])
        assert system["content"].startswith("Be kind.\n\n# Tools")
        assert system["name"] == "n"


def test_calls_and_results_of_the_history_become_texts() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assistant = {"role": "assistant", "content": None, "tool_calls": [call]}
    spoken = {**assistant, "content": "Let me see.", "tool_calls": [call, call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
    text = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert with_tools([USER, assistant, spoken, result], []) == [
        USER,
        {"role": "assistant", "content": text},
        {"role": "assistant", "content": f"Let me see.\n{text}\n{text}"},
        {"role": "user", "content": "<tool_response>\nsunny\n</tool_response>"},
    ]


def test_arguments_may_be_values_or_missing() -> None:
    for arguments, shown in (({"x": "é"}, '{"x": "é"}'), (None, "{}"), ("", "{}"), ("null", "{}")):
        call = {"function": {"name": "f", "arguments": arguments}}
        (message,) = with_tools([{"role": "assistant", "tool_calls": [call]}], [])
        assert f'"arguments": {shown}}}' in message["content"]


@pytest.mark.parametrize("arguments", ['{"ci', "[1]", 7])
def test_arguments_that_are_no_object_are_the_clients_fault(arguments: object) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(RequestError) as refused:
        with_tools([{"role": "assistant", "tool_calls": [call]}], [])
    assert refused.value.param == "messages"


@pytest.mark.parametrize("function", [None, "f", 7, []])
def test_a_call_whose_function_is_none_is_read_as_a_flat_one(function: object) -> None:
    call = {"function": function, "name": "f", "arguments": '{"x": 1}'}
    (message,) = with_tools([{"role": "assistant", "tool_calls": [call]}], [])
    assert '{"name": "f", "arguments": {"x": 1}}' in message["content"]


def test_what_a_tool_leaves_out_is_empty_for_templates_that_take_it_for_granted() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    bare = {"type": "function", "function": {"name": "f"}}
    nulls = {"function": {"name": "f", "description": None, "parameters": None, "strict": True}}
    whole = {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": schema},
    }
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    assert with_all_fields([bare, nulls, whole]) == [
        {"type": "function", "function": {"name": "f", **empty}},
        {"function": {"name": "f", "strict": True, **empty}},
        whole,
    ]
    assert bare == {"type": "function", "function": {"name": "f"}}
