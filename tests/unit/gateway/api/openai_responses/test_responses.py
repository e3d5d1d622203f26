"""The Responses API as chats and back, read with OpenAI's own types."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from openai.types.responses.response_text_config_param import ResponseTextConfigParam
from openai.types.shared_params.reasoning import Reasoning
from pydantic import TypeAdapter

from gateway.api.bodies import ChatBody, ignored_fields
from gateway.api.dialect import Ending
from gateway.api.errors import http_error
from gateway.api.openai_responses.answer import ResponseAnswer
from gateway.api.openai_responses.bodies import (
    ReasoningOptions,
    ResponsesBody,
    TextOptions,
    refuse_unsupported,
)
from gateway.api.openai_responses.chat import chat_fields, input_messages
from gateway.api.openai_responses.store import ResponseStore, StoredResponse
from gateway.api.responses import Usage
from gateway.api.tools import ToolMode, read_tools
from shared.errors import RequestError, Unavailable

USAGE = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=7)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


def body_of(**fields: Any) -> ResponsesBody:
    return msgspec.convert({"input": "hi", **fields}, ResponsesBody)


def answer(**fields: Any) -> ResponseAnswer:
    return ResponseAnswer(id="chatcmpl-1", created=5, model="m", body=body_of(**fields))


def checked_chat(body: ResponsesBody) -> dict[str, Any]:
    refuse_unsupported(body)
    return chat_fields(body, [])


def ending(reason: str) -> Ending:
    return Ending(reason=reason, stop_string=None, usage=USAGE)


def events_of(written: list[bytes]) -> list[dict[str, Any]]:
    """Each is valid, named as its type, and numbered."""
    events = []
    for number, block in enumerate(b"".join(written).decode().strip().split("\n\n")):
        name, line = block.split("\n")
        event = msgspec.json.decode(line.removeprefix("data: "))
        assert event["type"] == name.removeprefix("event: ")
        assert event["sequence_number"] == number
        EVENT.validate_python(event)
        events.append(event)
    return events


def call(index: int, **function: str) -> dict[str, Any]:
    own = {"id": f"call_{index}", "type": "function"} if "name" in function else {}
    return {"tool_calls": [{"index": index, **own, "function": function}]}


def test_a_text_with_instructions_and_options() -> None:
    chat = chat_fields(
        body_of(
            instructions="be brief",
            max_output_tokens=9,
            reasoning={"effort": "low"},
            text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
            tools=[{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}],
            tool_choice={"type": "function", "name": "f"},
        ),
        [{"role": "user", "content": "before"}],
    )
    assert chat["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "before"},
        {"role": "user", "content": "hi"},
    ]
    assert chat["max_completion_tokens"] == 9
    assert chat["reasoning_effort"] == "low"
    form = {"name": "n", "schema": SCHEMA, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": form}
    assert chat["tools"][0]["function"] == {"name": "f", "parameters": SCHEMA, "strict": True}
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}}


def test_a_choice_of_tools_is_the_same_in_a_chat() -> None:
    tools = [{"type": "function", "name": name, "parameters": SCHEMA} for name in ("f", "g")]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{**tools[1]}]}
    chat = chat_fields(body_of(tools=tools, tool_choice=choice), [])
    request = read_tools(msgspec.convert(chat, ChatBody))
    assert request.mode is ToolMode.REQUIRED
    assert set(request.schemas) == {"g"}
    with pytest.raises(RequestError, match="needs tools"):
        read_tools(msgspec.convert(chat_fields(body_of(tool_choice="required"), []), ChatBody))


def test_items_become_turns() -> None:
    items = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}], "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "7"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "done"}],
        },
    ]
    messages = input_messages(items)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["reasoning_content"] == "hm"
    assert [c["id"] for c in messages[2]["tool_calls"]] == ["c1", "c2"]
    assert messages[3] == {"role": "tool", "tool_call_id": "c1", "content": "7"}


def test_reasoning_belongs_to_the_turn_that_it_stands_in() -> None:
    def thought(text: str) -> dict[str, Any]:
        return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}

    said = {"role": "assistant", "content": "I look."}
    made = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    (turn,) = input_messages([thought("a"), said, thought("b"), made])
    assert (turn["content"], turn["reasoning_content"], len(turn["tool_calls"])) == (
        "I look.",
        "ab",
        1,
    )
    cut_off = {"role": "assistant", "content": "", "reasoning_content": "a"}
    user = {"role": "user", "content": "Go on."}
    assert input_messages([thought("a"), user, said]) == [cut_off, user, said]
    assert input_messages([thought("a")]) == [cut_off]
    assert input_messages([thought(""), user]) == [user]


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [7]},
        {"input": [{"role": "robot", "content": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        {"input": [{"type": "function_call", "name": "f"}]},
        {"tools": [{"type": "web_search"}]},
        {"background": True},
        {"conversation": "c"},
        {"truncation": "some"},
        {"include": ["file_search_call.results"]},
    ],
)
def test_what_cannot_be_done_names_its_field(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        checked_chat(body_of(**fields))
    assert caught.value.param == next(iter(fields))


def test_a_whole_response() -> None:
    deltas = [{"reasoning_content": "hm"}, {"content": "hi"}, call(0, name="f", arguments="{}")]
    body = msgspec.json.decode(answer().whole(deltas, ending("tool_calls")))
    parsed = Response.model_validate(body)
    assert [item.type for item in parsed.output] == ["reasoning", "message", "function_call"]
    assert (parsed.status, parsed.output_text) == ("completed", "hi")
    assert parsed.usage is not None
    assert parsed.usage.input_tokens_details.cached_tokens == 4


def test_a_response_that_was_cut_off_says_so() -> None:
    for deltas, kind in (
        ([{"content": "hi"}], "message"),
        ([{"reasoning_content": "hm"}], "reasoning"),
        ([call(0, name="f", arguments='{"x"')], "function_call"),
        ([], "message"),
    ):
        body = msgspec.json.decode(answer().whole(deltas, ending("length")))
        assert (body["status"], body["incomplete_details"]) == (
            "incomplete",
            {"reason": "max_output_tokens"},
        )
        assert [(item["type"], item["status"]) for item in body["output"]] == [(kind, "incomplete")]


def test_an_empty_stream_has_an_empty_message() -> None:
    writer = answer()
    events = events_of(writer.begin(USAGE) + writer.end(ending("stop")))
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_a_failed_stream_keeps_what_came() -> None:
    writer = answer()
    written = writer.begin(USAGE) + writer.deltas([{"content": "hi"}])
    events = events_of([*written, writer.failed(http_error(Unavailable("no rank")))])
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"]["message"] == "no rank"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "hi"


def stored(number: int, owner: str = "a") -> StoredResponse:
    messages = [{"role": "user", "content": "x" * 100}]
    return StoredResponse.of({"id": f"resp_{number}", "output": []}, messages, owner=owner)


def test_the_store_is_bounded_and_keeps_what_is_used() -> None:
    store = ResponseStore(500)
    for number in range(3):
        store.put(stored(number))
    assert store.get("resp_0", "a") is not None
    store.put(stored(3))
    assert store.get("resp_1", "a") is None
    assert store.get("resp_0", "a") is not None
    store.put(StoredResponse.of({"id": "x" * 600, "output": []}, [], owner="a"))
    assert len(store) == 3


def test_a_response_that_ends_twice_is_kept_once() -> None:
    """A client resumes a stream that its gateway has written to its end."""
    store = ResponseStore(500)
    store.put(stored(0))
    for _ in range(20):
        store.put(stored(1))
    assert store.get("resp_0", "a") is not None
    assert store.delete("resp_1", "a")
    store.put(stored(2))
    store.put(stored(3))
    assert len(store) == 3


def test_a_response_comes_back_as_it_was() -> None:
    response = {"id": "resp_1", "output": [{"text": "é😀\ud7ff", "logprobs": None}], "n": 0.1}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "\0"}]},
        {"role": "assistant", "content": None},
    ]
    store = ResponseStore(500)
    store.put(StoredResponse.of(response, messages, owner="a"))
    found = store.get("resp_1", "a")
    assert found is not None
    assert (json.loads(found.response), found.messages) == (response, messages)


def test_the_store_takes_no_more_memory_than_its_bound_says() -> None:
    """The tools that a client sends are part of a response: nested ones of 32 KB took 1 MB."""
    bytes_max = 1 << 20
    store = ResponseStore(bytes_max)
    nested = "[" * 500 + "]" * 500
    tools = ("[" + ",".join([nested] * 30) + "]").encode()
    tracemalloc.start()
    try:
        for number in range(50):
            parameters = msgspec.json.decode(tools)
            tools_of = [{"parameters": parameters}]
            response = {"id": f"resp_{number}", "output": [], "tools": tools_of}
            store.put(StoredResponse.of(response, [], owner="a"))
        del parameters, response, tools_of
        assert 25 < len(store) < 40
        assert tracemalloc.get_traced_memory()[0] < 1.5 * bytes_max
    finally:
        tracemalloc.stop()


def test_a_response_exists_for_its_owner_alone() -> None:
    store = ResponseStore(500)
    store.put(stored(0, "a"))
    assert store.get("resp_0", "b") is None
    assert not store.delete("resp_0", "b")
    assert store.delete("resp_0", "a")
    assert store.get("resp_0", "a") is None


@pytest.mark.parametrize(
    ("body", "theirs"),
    [
        (ResponsesBody, ResponseCreateParamsBase),
        (ReasoningOptions, Reasoning),
        (TextOptions, ResponseTextConfigParam),
    ],
)
def test_every_field_of_the_api_is_known(body: type[msgspec.Struct], theirs: type) -> None:
    assert set(theirs.__annotations__) <= set(body.__struct_fields__)


@pytest.mark.parametrize(
    ("field", "value", "plain"),
    [
        ("text", {"verbosity": "low"}, {"verbosity": "medium"}),
        ("reasoning", {"mode": "pro"}, {"mode": "standard"}),
        ("reasoning", {"context": "all_turns"}, {"context": "auto"}),
    ],
)
def test_what_would_change_the_answer_inside_an_object_is_refused(
    field: str, value: dict[str, str], plain: dict[str, str]
) -> None:
    checked_chat(body_of(**{field: plain}))
    with pytest.raises(RequestError) as refused:
        checked_chat(body_of(**{field: value}))
    assert refused.value.param == field


def test_unknown_fields_of_objects_are_named() -> None:
    fields = {"input": "hi", "text": {"colour": 1}, "reasoning": None, "user": "u", "temprature": 0}
    named = ignored_fields(msgspec.json.encode(fields), ResponsesBody)
    assert named == ["temprature", "text.colour"]
