"""Answers of the Responses API: items of output, in the order in which the model wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.api.dialect import Ending, sent_event
from gateway.api.errors import HttpError
from gateway.api.openai_responses.bodies import ResponsesBody
from gateway.api.responses import Usage

_encode = msgspec.json.encode

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
"""Kind of an item → how its id begins. The id goes on with its response's and its index."""


@dataclass(slots=True)
class _Item:
    """An item of output. `kind` is message, reasoning or function_call."""

    kind: str
    index: int
    id: str
    status: str = "in_progress"
    texts: list[str] = field(default_factory=list)
    call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def plain(self) -> dict[str, Any]:
        match self.kind:
            case "reasoning":
                content = [{"type": "reasoning_text", "text": self.text}] if self.text else []
                return {
                    "id": self.id,
                    "type": "reasoning",
                    "summary": [],
                    "content": content,
                    "status": self.status,
                }
            case "function_call":
                return {
                    "id": self.id,
                    "type": "function_call",
                    "status": self.status,
                    "call_id": self.call_id,
                    "name": self.name,
                    "arguments": self.text,
                }
        content = [_output_text(self.text)] if self.status != "in_progress" else []
        return {
            "id": self.id,
            "type": "message",
            "status": self.status,
            "role": "assistant",
            "content": content,
        }


class ResponseAnswer:
    """Implements `dialect.Dialect`. `id` is OpenAI's id of the chat answer. `seed`: the first event
    of a stream names it. `done` is the finished response, for the store."""

    def __init__(
        self, *, id: str, created: int, model: str, body: ResponsesBody, seed: int | None = None
    ) -> None:
        self._suffix = id.removeprefix("chatcmpl-")
        self.id = _response_id(self._suffix)
        self._created = created
        self._model = model
        self._seed = {} if seed is None else {"seed": seed}
        self._body = body
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._sequence = 0
        self.done: dict[str, Any] | None = None

    def whole(self, deltas: Sequence[Mapping[str, Any]], ending: Ending) -> bytes:
        self.deltas(deltas)
        self._finish(ending)
        return _encode(self.done)

    def number_from(self, number: int) -> None:
        self._sequence = number

    def begin(self, usage: Usage) -> list[bytes]:
        begun = self._response(None)
        return [
            self._event("response.created", response=begun, **self._seed),
            self._event("response.in_progress", response=begun),
        ]

    def deltas(self, deltas: Sequence[Mapping[str, Any]]) -> list[bytes]:
        events: list[bytes] = []
        for delta in deltas:
            if text := delta.get("reasoning_content"):
                events += [*self._enter("reasoning"), self._add(text)]
            elif text := delta.get("content"):
                events += [*self._enter("message"), self._add(text)]
            for call in delta.get("tool_calls") or ():
                events += self._call(call)
        return events

    def end(self, ending: Ending) -> list[bytes]:
        events, response = self._finish(ending)
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def _finish(self, ending: Ending) -> tuple[list[bytes], dict[str, Any]]:
        events: list[bytes] = []
        if not self._items:
            events += self._enter("message")
        events += self._close(_item_status(ending))
        self.done = self._response(ending)
        return events, self.done

    def failed(self, error: HttpError) -> bytes:
        plain = msgspec.json.decode(error.body)["error"]
        events = self._close("incomplete")
        response = {
            **self._response(None),
            "status": "failed",
            "output": [item.plain() for item in self._items],
            "error": {"code": "server_error", "message": plain["message"]},
        }
        return b"".join(events) + self._event("response.failed", response=response)

    def _call(self, call: Mapping[str, Any]) -> list[bytes]:
        """A call begins with its id and name; what follows are pieces of its arguments."""
        function = call["function"]
        events: list[bytes] = []
        if "id" in call:
            events += self._enter("function_call", call["id"], function["name"])
        if function.get("arguments"):
            events.append(self._add(function["arguments"]))
        return events

    def _enter(self, kind: str, call_id: str = "", name: str = "") -> list[bytes]:
        if self._open is not None and self._open.kind == kind and not call_id:
            return []
        events = self._close("completed")
        item = self._open = self._new_item(kind)
        item.call_id, item.name = call_id, name
        added = {"output_index": item.index, "item": item.plain()}
        events.append(self._event("response.output_item.added", **added))
        if kind == "function_call":
            return events
        part = _output_text("") if kind == "message" else {"type": "reasoning_text", "text": ""}
        return [*events, self._event("response.content_part.added", **_content(item), part=part)]

    def _add(self, text: str) -> bytes:
        item = self._open
        assert item is not None, "an item is entered before it is written"
        item.texts.append(text)
        match item.kind:
            case "message":
                fields: dict[str, Any] = {**_content(item), "delta": text, "logprobs": []}
                return self._event("response.output_text.delta", **fields)
            case "reasoning":
                return self._event("response.reasoning_text.delta", **_content(item), delta=text)
        fields = {"item_id": item.id, "output_index": item.index, "delta": text}
        return self._event("response.function_call_arguments.delta", **fields)

    def _close(self, status: str) -> list[bytes]:
        item, self._open = self._open, None
        if item is None:
            return []
        item.status = status
        match item.kind:
            case "message":
                part = _output_text(item.text)
                fields: dict[str, Any] = {**_content(item), "text": item.text, "logprobs": []}
                events = [
                    self._event("response.output_text.done", **fields),
                    self._event("response.content_part.done", **_content(item), part=part),
                ]
            case "reasoning":
                part = {"type": "reasoning_text", "text": item.text}
                events = [
                    self._event("response.reasoning_text.done", **_content(item), text=item.text),
                    self._event("response.content_part.done", **_content(item), part=part),
                ]
            case _:
                events = [
                    self._event(
                        "response.function_call_arguments.done",
                        item_id=item.id,
                        output_index=item.index,
                        name=item.name,
                        arguments=item.text,
                    )
                ]
        done = {"output_index": item.index, "item": item.plain()}
        return [*events, self._event("response.output_item.done", **done)]

    def _new_item(self, kind: str) -> _Item:
        index = len(self._items)
        item = _Item(kind=kind, index=index, id=f"{_PREFIXES[kind]}_{self._suffix}_{index}")
        self._items.append(item)
        return item

    def _response(self, ending: Ending | None) -> dict[str, Any]:
        """None: it has just begun."""
        body = self._body
        cut_off = ending is not None and ending.reason == "length"
        status = "in_progress" if ending is None else "incomplete" if cut_off else "completed"
        text = body.text.format if body.text is not None and body.text.format else {"type": "text"}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": [] if ending is None else [item.plain() for item in self._items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {
                "effort": body.reasoning.effort if body.reasoning is not None else None,
                "summary": None,
            },
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": text},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None if ending is None else _usage(ending.usage),
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = _encode({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return sent_event(kind, data)


def response_of_item(item_id: str) -> str | None:
    """The id of the response that an item of this id is from; None if no item has such an id."""
    prefix, _, rest = item_id.partition("_")
    suffix, _, index = rest.rpartition("_")
    return _response_id(suffix) if prefix in _PREFIXES.values() and suffix and index else None


def _response_id(suffix: str) -> str:
    return f"resp_{suffix}"


def _item_status(ending: Ending) -> str:
    return "incomplete" if ending.reason == "length" else "completed"


def _content(item: _Item) -> dict[str, Any]:
    return {"item_id": item.id, "output_index": item.index, "content_index": 0}


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
