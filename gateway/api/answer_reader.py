"""Turns the text of one chat choice into OpenAI's shapes: content, reasoning and tool calls, as one
message or as the deltas of a stream."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.api.token_offsets import TokenOffsets
from gateway.parsers.events import CallArguments, CallStart, Content, Event, Reasoning
from gateway.parsers.formats import ToolFormat
from gateway.parsers.output_parser import OutputParser
from shared.types import FinishReason

TOOL_CALLS = "tool_calls"

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallIds:
    """Ids of the calls of one choice. They depend on the answer's id, the choice and the call's
    number alone."""

    answer: str
    choice: int
    form: ToolFormat | None

    def id(self, call: int) -> str:
        chars, prefix = (24, "call_")
        if self.form is not None:
            chars, prefix = self.form.call_id_chars, self.form.call_id_prefix
        seed = f"{self.answer}/{self.choice}/{call}".encode()
        number = int.from_bytes(hashlib.blake2b(seed, digest_size=32).digest(), "little")
        digits: list[str] = []
        for _ in range(chars):
            number, digit = divmod(number, len(_ALPHABET))
            digits.append(_ALPHABET[digit])
        return prefix + "".join(digits)


@dataclass(slots=True)
class _Part:
    """A run of content, of reasoning, or a call, whose texts are its arguments. `number`: of the
    call."""

    kind: type[Content] | type[Reasoning] | type[CallStart]
    texts: list[str] = field(default_factory=list)
    name: str = ""
    number: int = 0

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def is_whole(self) -> bool:
        """False: a call whose arguments are no JSON."""
        if self.kind is not CallStart:
            return True
        try:
            msgspec.json.decode(self.text)
        except (msgspec.DecodeError, RecursionError):
            return False
        return True


class AnswerReader:
    """Gets the text and tokens of a choice in order, and at the end `finish`. The calls, texts and
    ids of a stream are those of the message."""

    def __init__(
        self,
        parser: OutputParser,
        offsets: TokenOffsets,
        call_ids: CallIds,
        *,
        shows_reasoning: bool,
    ) -> None:
        self._parser = parser
        self._offsets = offsets
        self._call_ids = call_ids
        self._shows_reasoning = shows_reasoning
        self._token_starts: list[int] = []
        self._num_spans_counted = 0
        self._num_reasoning_tokens = 0  # of these
        self._parts: list[_Part] = []
        self._num_calls = 0

    def feed(
        self, text: str, token_ids: Sequence[int], finish: FinishReason | None
    ) -> list[dict[str, Any]]:
        """The deltas of a stream for it."""
        self._token_starts += map(self._offsets.next, token_ids)
        events = self._parser.feed(text)
        if finish is not None:
            events += self._parser.finish()
        return [delta for event in events if (delta := self._delta(event)) is not None]

    def whole(self) -> list[dict[str, Any]]:
        """All of it in as few deltas as there can be, in the order of a stream's."""
        deltas: list[dict[str, Any]] = []
        for part in self._parts:
            if part.kind is CallStart:
                deltas.append(self._call_delta(part))
            if part.text:
                deltas.append(_text_delta(part, part.text))
        return deltas

    def message(self) -> dict[str, Any]:
        content, reasoning = self._text(Content), self._text(Reasoning)
        calls = [part for part in self._parts if part.kind is CallStart]
        shown = None if calls and not content else content
        message: dict[str, Any] = {"role": "assistant", "content": shown, "refusal": None}
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if calls:
            message[TOOL_CALLS] = [self._call(call, call.text) for call in calls]
        return message

    def finish_reason(self, finish: FinishReason, stop: str | int | None) -> str:
        """`stop` is the client's string or token that ended the text. If it has cut a call off, the
        answer is no call to be made."""
        if not self._num_calls or finish is not FinishReason.STOP:
            return finish.value
        is_cut = stop is not None and not self._parts[-1].is_whole
        return finish.value if is_cut else TOOL_CALLS

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens that begin in the reasoning, without those of its markers. Quick, for a stream may
        tell it with every token: of many spans only the last one grows."""
        spans = self._parser.reasoning_spans
        while self._num_spans_counted < len(spans) - 1:
            self._num_reasoning_tokens += self._num_tokens_in(*spans[self._num_spans_counted])
            self._num_spans_counted += 1
        return self._num_reasoning_tokens + (self._num_tokens_in(*spans[-1]) if spans else 0)

    def _num_tokens_in(self, begin: int, end: int) -> int:
        starts = self._token_starts
        return bisect_left(starts, end) - bisect_left(starts, begin)

    def _delta(self, event: Event) -> dict[str, Any] | None:
        match event:
            case CallStart(name):
                part = _Part(CallStart, name=name, number=self._num_calls)
                self._num_calls += 1
                self._parts.append(part)
                return self._call_delta(part)
            case CallArguments(text):
                part = self._parts[-1]  # nothing comes between a call and its arguments
            case Content(text):
                part = self._part(Content)
            case Reasoning(text):
                if not self._shows_reasoning:
                    return None
                part = self._part(Reasoning)
        part.texts.append(text)
        return _text_delta(part, text)

    def _part(self, kind: type[Content] | type[Reasoning]) -> _Part:
        if not self._parts or self._parts[-1].kind is not kind:
            self._parts.append(_Part(kind))
        return self._parts[-1]

    def _text(self, kind: type[Content] | type[Reasoning]) -> str:
        return "".join(part.text for part in self._parts if part.kind is kind)

    def _call_delta(self, part: _Part) -> dict[str, Any]:
        return {TOOL_CALLS: [{"index": part.number, **self._call(part, "")}]}

    def _call(self, part: _Part, arguments: str) -> dict[str, Any]:
        function = {"name": part.name, "arguments": arguments}
        return {"id": self._call_ids.id(part.number), "type": "function", "function": function}


def _text_delta(part: _Part, text: str) -> dict[str, Any]:
    if part.kind is CallStart:
        return {TOOL_CALLS: [{"index": part.number, "function": {"arguments": text}}]}
    if part.kind is Reasoning:
        return {"reasoning_content": text, "reasoning": text}
    return {"content": text}
