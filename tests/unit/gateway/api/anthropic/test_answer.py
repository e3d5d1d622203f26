"""Answers of the Messages API, read with Anthropic's own types."""

from __future__ import annotations

from typing import Any

import msgspec
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from gateway.api.anthropic.answer import (
    NO_THREADS,
    UNPARSED,
    MessagesAnswer,
    error_body,
    read_arguments,
)
from gateway.api.dialect import Ending
from gateway.api.errors import http_error
from gateway.api.responses import Usage
from shared.errors import Overloaded, RequestError

USAGE = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=7)
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def answer() -> MessagesAnswer:
    return MessagesAnswer(id="chatcmpl-1", model="m")


def ending(reason: str, stop_string: str | None = None) -> Ending:
    return Ending(reason=reason, stop_string=stop_string, usage=USAGE)


def events_of(written: list[bytes]) -> list[dict[str, Any]]:
    """Each is valid, and named as its type."""
    events = []
    for block in b"".join(written).decode().strip().split("\n\n"):
        name, body = block.split("\n")
        event = msgspec.json.decode(body.removeprefix("data: "))
        assert event["type"] == name.removeprefix("event: ")
        if event["type"] != "ping":
            EVENT.validate_python(event)
        events.append(event)
    return events


def call(index: int, **function: str) -> dict[str, Any]:
    own = {"id": f"call_{index}", "type": "function"} if "name" in function else {}
    return {"tool_calls": [{"index": index, **own, "function": function}]}


def test_a_whole_answer_with_every_kind_of_block() -> None:
    deltas = [
        {"reasoning_content": "hm"},
        {"content": "hi"},
        call(0, name="f", arguments='{"x":1}'),
        {"content": "there"},
    ]
    body = msgspec.json.decode(answer().whole(deltas, ending("tool_calls")))
    parsed = Message.model_validate(body)
    assert [block.type for block in parsed.content] == ["thinking", "text", "tool_use", "text"]
    assert body["content"][2]["input"] == {"x": 1}
    assert parsed.stop_reason == "tool_use"
    assert (parsed.usage.input_tokens, parsed.usage.cache_read_input_tokens) == (6, 4)


def test_why_an_answer_ended() -> None:
    def stop_of(end: Ending) -> tuple[str, str | None]:
        body = msgspec.json.decode(answer().whole([{"content": "hi"}], end))
        return body["stop_reason"], body["stop_sequence"]

    assert stop_of(ending("stop")) == ("end_turn", None)
    assert stop_of(ending("stop", "END")) == ("stop_sequence", "END")
    assert stop_of(ending("tool_calls", "END")) == ("tool_use", None)
    assert stop_of(ending("length")) == ("max_tokens", None)


def test_a_stream_opens_and_closes_each_block_once() -> None:
    writer = answer()
    written = writer.begin(USAGE)
    written += writer.deltas([{"reasoning_content": "h"}, {"reasoning_content": "m"}])
    written += writer.deltas([{"content": "a"}])
    written += writer.deltas([{"content": "b"}, call(0, name="f", arguments="")])
    written += writer.deltas([call(0, arguments='{"x"'), call(0, arguments=":1}")])
    written += writer.deltas([call(1, name="g", arguments="{}")])
    written += writer.end(ending("tool_calls"))
    events = events_of(written)
    assert [
        (event["index"], event["content_block"]["type"])
        for event in events
        if event["type"] == "content_block_start"
    ] == [(0, "thinking"), (1, "text"), (2, "tool_use"), (3, "tool_use")]
    stopped = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert stopped == [0, 1, 2, 3]
    pieces = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(p.get("thinking", "") for p in pieces) == "hm"
    assert "".join(p.get("text", "") for p in pieces) == "ab"
    assert "".join(p.get("partial_json", "") for p in pieces) == '{"x":1}{}'
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] == 7


def test_an_empty_stream_has_no_block() -> None:
    writer = answer()
    events = events_of(writer.begin(USAGE) + writer.end(ending("stop")))
    assert [e["type"] for e in events] == ["message_start", "ping", "message_delta", "message_stop"]


def test_errors_have_anthropics_shape() -> None:
    shown = msgspec.json.decode(error_body(http_error(RequestError("no", param="messages"))))
    assert shown == {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
    full = http_error(Overloaded("full", retry_after_s=1))
    assert msgspec.json.decode(error_body(full))["error"]["type"] == "rate_limit_error"
    assert answer().failed(full).startswith(b"event: error\ndata: {")


def test_a_conversation_that_is_not_held_is_refused_so_that_clients_send_it_whole() -> None:
    """As anthropic's `tool_runner` reads it."""
    refused = http_error(RequestError("no", param="thread", code=NO_THREADS))
    details = msgspec.json.decode(error_body(refused))["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_arguments_that_were_cut_off_stay_readable() -> None:
    assert read_arguments("") == {}
    assert read_arguments('{"x": [1,') == {UNPARSED: '{"x": [1,'}
    assert read_arguments("[1]") == {UNPARSED: "[1]"}
