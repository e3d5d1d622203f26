"""Messages as clients send them: parts, other keys, and refusals that name `messages`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.bodies import ChatBody, decode_body
from gateway.api.messages import read_chat_options, read_messages
from gateway.chat_template import ChatOptions, ChatTemplate
from gateway.tool_prompt import with_tools
from shared.errors import RequestError
from tests.support.fake_clock import FakeClock

USER = {"role": "user", "content": "hi"}


def body(**fields: Any) -> ChatBody:
    return decode_body(json.dumps({"messages": [USER], **fields}).encode(), ChatBody)


def read(*messages: Any) -> list[dict[str, Any]]:
    return read_messages(body(messages=list(messages)).messages)


def test_every_key_of_a_message_is_handed_on() -> None:
    message = {
        **USER,
        "name": "n",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}, "index": 0}],
        "reasoning_content": "r",
        "refusal": None,
        "custom": {"deep": [1, None]},
    }
    assert read(message) == [message]


def test_parts_of_every_spelling_are_text_parts() -> None:
    parts = [
        {"type": "text", "text": "a", "cache_control": {}},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c", "annotations": []},
        {"type": "refusal", "refusal": "d"},
        "e",
    ]
    (message,) = read({"role": "user", "content": parts})
    assert [part["type"] for part in message["content"]] == ["text"] * 5
    assert "".join(part["text"] for part in message["content"]) == "abcde"
    assert message["content"][0]["cache_control"] == {}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("hi", "role"),
        ({}, "role"),
        ({"role": 1}, "role"),
        ({"role": "user", "content": 1}, "content"),
        ({"role": "user", "content": {"type": "text"}}, "content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "image_url"),
        ({"role": "user", "content": [{"type": "text"}]}, "has no text"),
        ({"role": "user", "content": [{"type": ["text"], "text": "a"}]}, "only text"),
        ({"role": "user", "content": [None]}, "only text"),
        ({"role": "assistant", "tool_calls": {}}, "tool_calls"),
        ({"role": "assistant", "tool_calls": ["f"]}, "tool_calls"),
    ],
)
def test_what_is_no_message_is_refused(message: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        read(USER, message)
    assert caught.value.param == "messages"
    assert "message 1" in str(caught.value)


def test_a_chat_needs_a_message() -> None:
    with pytest.raises(RequestError) as caught:
        read()
    assert caught.value.param == "messages"


def test_the_options_of_a_template_are_read() -> None:
    options = read_chat_options(
        body(
            add_generation_prompt=False,
            continue_final_message=True,
            documents=[{"title": "t"}],
            chat_template_kwargs={"enable_thinking": False},
        )
    )
    assert options == ChatOptions(
        documents=[{"title": "t"}],
        add_generation_prompt=False,
        continue_final_message=True,
        variables={"enable_thinking": False},
    )
    assert read_chat_options(body()) == ChatOptions()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("documents", ["x"]),
        ("documents", "x"),
        ("chat_template", "x"),
        ("add_generation_prompt", "no"),
        ("continue_final_message", 1),
        ("chat_template_kwargs", []),
    ],
)
def test_wrong_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        read_chat_options(body(**{name: value}))
    assert caught.value.param == name


JSON = st.sampled_from([None, True, 1, "", "x", "{}", '{"a": 1}', [], {}, [None], {"a": ["x"]}])
KEYS = st.sampled_from(
    ["role", "content", "tool_calls", "function", "arguments", "name", "type", "text", "thinking"]
)
TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.role + m.content }}{% for c in m.tool_calls %}{{ c.function.name "
    "+ c.function.arguments | tojson }}{% endfor %}{% endfor %}",
    {},
    FakeClock(),
)


@given(
    st.lists(
        st.dictionaries(KEYS, JSON | st.lists(st.dictionaries(KEYS, JSON), max_size=3)).map(
            lambda message: {"role": "assistant", **message}
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_any_messages_are_rendered_or_refused(messages: list[Any], continues: bool) -> None:
    options = ChatOptions(continue_final_message=continues)
    param = "messages"
    for change in (list, lambda read: with_tools(read, [])):
        try:
            TEMPLATE.render(change(read_messages(messages)), options)
        except RequestError as error:
            param = error.param or ""
        assert param in ("messages", "continue_final_message")
