"""Answers of the Messages API. Blocks come in the order in which the model wrote them: thinking,
text, calls of tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gateway.api.dialect import Ending, sent_event
from gateway.api.errors import HttpError
from gateway.api.responses import Usage

_encode = msgspec.json.encode

UNPARSED = "_unparsed_arguments"
"""Key of the input of a call that `max_tokens` cut off."""

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessagesAnswer:
    """Implements `dialect.Dialect`. `id` is OpenAI's id of the answer. `seed`: the first event of a
    stream names it."""

    def __init__(self, *, id: str, model: str, seed: int | None = None) -> None:
        self._id = "msg_" + id.removeprefix("chatcmpl-")
        self._model = model
        self._seed = {} if seed is None else {"seed": seed}
        self._index = -1  # of the newest block
        self._open = ""  # its type, while it is open

    def whole(self, message: Mapping[str, Any], ending: Ending) -> bytes:
        content: list[dict[str, Any]] = []
        if message.get("reasoning_content"):
            content.append(_thinking(message["reasoning_content"]))
        if message.get("content"):
            content.append({"type": "text", "text": message["content"]})
        for call in message.get("tool_calls") or ():
            function = call["function"]
            arguments = read_arguments(function["arguments"])
            content.append(_tool_use(call["id"], function["name"], arguments))
        return _encode({**self._message(content), **_stop(ending), "usage": _usage(ending.usage)})

    def number_from(self, number: int) -> None:
        """Events have none."""

    def begin(self, usage: Usage) -> list[bytes]:
        message = {
            **self._message([]),
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**_usage(usage), "output_tokens": 0},
        }
        return [_event("message_start", message=message, **self._seed), _event("ping")]

    def deltas(self, deltas: Sequence[Mapping[str, Any]]) -> list[bytes]:
        events: list[bytes] = []
        for delta in deltas:
            if text := delta.get("reasoning_content"):
                events += self._enter("thinking", _thinking(""))
                events.append(self._delta({"type": "thinking_delta", "thinking": text}))
            elif text := delta.get("content"):
                events += self._enter("text", {"type": "text", "text": ""})
                events.append(self._delta({"type": "text_delta", "text": text}))
            for call in delta.get("tool_calls") or ():
                events += self._call(call)
        return events

    def end(self, ending: Ending) -> list[bytes]:
        usage = {"output_tokens": ending.usage.completion_tokens}
        return [
            *self._close(),
            _event("message_delta", delta=_stop(ending), usage=usage),
            _event("message_stop"),
        ]

    def failed(self, error: HttpError) -> bytes:
        return sent_event("error", error_body(error))

    def _call(self, call: Mapping[str, Any]) -> list[bytes]:
        """A call begins with its id and name; what follows are pieces of its arguments."""
        function = call["function"]
        events: list[bytes] = []
        if "id" in call:
            events = self._close()
            events += self._enter("tool_use", _tool_use(call["id"], function["name"], {}))
        if function.get("arguments"):
            delta = {"type": "input_json_delta", "partial_json": function["arguments"]}
            events.append(self._delta(delta))
        return events

    def _enter(self, kind: str, block: Mapping[str, Any]) -> list[bytes]:
        if self._open == kind:
            return []
        closed = self._close()
        self._index += 1
        self._open = kind
        return [*closed, _event("content_block_start", index=self._index, content_block=block)]

    def _close(self) -> list[bytes]:
        if not self._open:
            return []
        events: list[bytes] = []
        if self._open == "thinking":
            events.append(self._delta({"type": "signature_delta", "signature": ""}))
        self._open = ""
        return [*events, _event("content_block_stop", index=self._index)]

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
        }


def error_body(error: HttpError, request_id: str | None = None) -> bytes:
    """Anthropic's shape of an error whose body has OpenAI's."""
    message = msgspec.json.decode(error.body)["error"]["message"]
    kind = _ERROR_TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    plain = {"type": "error", "error": {"type": kind, "message": message}}
    return _encode(plain if request_id is None else {**plain, "request_id": request_id})


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call as an object. Those that were cut off are kept as text."""
    try:
        arguments = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        return {UNPARSED: text}
    return arguments if isinstance(arguments, dict) else {UNPARSED: text}


def _event(kind: str, **fields: Any) -> bytes:
    return sent_event(kind, _encode({"type": kind, **fields}))


def _thinking(text: str) -> dict[str, Any]:
    """There is no signature: the next request may carry any thinking."""
    return {"type": "thinking", "thinking": text, "signature": ""}


def _tool_use(call: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call, "name": name, "input": arguments}


def _stop(ending: Ending) -> dict[str, Any]:
    reason = _STOP_REASONS.get(ending.reason)
    if reason is None:
        reason = "end_turn" if ending.stop_string is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": ending.stop_string}


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts cached tokens apart from the other input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
