"""Answers of the Messages API. Blocks come in the order in which the model wrote them: thinking,
text, calls of tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.api.dialect import Ending, sent_event
from gateway.api.errors import HttpError
from gateway.api.responses import Usage

_encode = msgspec.json.encode

UNPARSED = "_unparsed_arguments"
"""Key of the input of a call that `max_tokens` cut off."""

NO_THREADS = "thread_unsupported_request"
"""Code of an error after which Anthropic's clients send the whole conversation."""

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(slots=True)
class _Block:
    """A block of content. `kind` is thinking, text or tool_use."""

    kind: str
    texts: list[str] = field(default_factory=list)
    call_id: str = ""
    name: str = ""

    def plain(self) -> dict[str, Any]:
        text = "".join(self.texts)
        match self.kind:
            case "thinking":  # no signature: the next request may carry any thinking
                return {"type": "thinking", "thinking": text, "signature": ""}
            case "text":
                return {"type": "text", "text": text}
        arguments = read_arguments(text)
        return {"type": "tool_use", "id": self.call_id, "name": self.name, "input": arguments}


class MessagesAnswer:
    """Implements `dialect.Dialect`. `id` is OpenAI's id of the answer. `seed`: the first event of a
    stream names it."""

    def __init__(self, *, id: str, model: str, seed: int | None = None) -> None:
        self._id = "msg_" + id.removeprefix("chatcmpl-")
        self._model = model
        self._seed = {} if seed is None else {"seed": seed}
        self._blocks: list[_Block] = []
        self._is_open = False  # the newest one

    def whole(self, deltas: Sequence[Mapping[str, Any]], ending: Ending) -> bytes:
        self.deltas(deltas)
        content = [block.plain() for block in self._blocks]
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
                events += [*self._enter("thinking"), self._add(text)]
            elif text := delta.get("content"):
                events += [*self._enter("text"), self._add(text)]
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
            events += self._enter("tool_use", call["id"], function["name"])
        if function.get("arguments"):
            events.append(self._add(function["arguments"]))
        return events

    def _enter(self, kind: str, call_id: str = "", name: str = "") -> list[bytes]:
        if self._is_open and self._blocks[-1].kind == kind and not call_id:
            return []
        events = self._close()
        block = _Block(kind=kind, call_id=call_id, name=name)
        events.append(
            _event("content_block_start", index=len(self._blocks), content_block=block.plain())
        )
        self._blocks.append(block)
        self._is_open = True
        return events

    def _add(self, text: str) -> bytes:
        block = self._blocks[-1]
        block.texts.append(text)
        match block.kind:
            case "thinking":
                return self._delta({"type": "thinking_delta", "thinking": text})
            case "text":
                return self._delta({"type": "text_delta", "text": text})
        return self._delta({"type": "input_json_delta", "partial_json": text})

    def _close(self) -> list[bytes]:
        if not self._is_open:
            return []
        events: list[bytes] = []
        if self._blocks[-1].kind == "thinking":
            events.append(self._delta({"type": "signature_delta", "signature": ""}))
        self._is_open = False
        return [*events, _event("content_block_stop", index=len(self._blocks) - 1)]

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

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
    openai = msgspec.json.decode(error.body)["error"]
    kind = _ERROR_TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    told: dict[str, Any] = {"type": kind, "message": openai["message"]}
    if openai["code"] == NO_THREADS:
        told["details"] = {"error_code": NO_THREADS, "unsupported": ["thread"]}
    plain = {"type": "error", "error": told}
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


def _stop(ending: Ending) -> dict[str, Any]:
    """A stop sequence is named only where it is the reason."""
    reason = _STOP_REASONS.get(ending.reason)
    if reason is not None or ending.stop_string is None:
        return {"stop_reason": reason or "end_turn", "stop_sequence": None}
    return {"stop_reason": "stop_sequence", "stop_sequence": ending.stop_string}


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts cached tokens apart from the other input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
