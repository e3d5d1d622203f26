"""OpenAI's shapes of answers, chunks and errors, as JSON bytes. The parts of a chunk that are the
same in the whole stream are encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shared.types import FinishReason

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The fields with which every answer and chunk of a request begins. `fingerprint` is that of
    the served model."""

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A finished choice. `stop` is the stop string or stop token that ended it. `message` is a
    chat's, if its text was parsed; else it has the text."""

    text: str
    token_ids: list[int]
    prompt_ids: tuple[int, ...]
    finish_reason: str
    stop: str | int | None
    logprobs: msgspec.Raw | None
    prompt_logprobs: msgspec.Raw | None
    message: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int  # part of prompt_tokens
    completion_tokens: int
    reasoning_tokens: int | None = None  # part of completion_tokens; None: nobody counts them

    def plain(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        plain: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            details = {"reasoning_tokens": self.reasoning_tokens}
            plain["completion_tokens_details"] = details
        return plain


def response_body(
    header: Header, choices: Sequence[Choice], usage: Usage, *, with_token_ids: bool
) -> bytes:
    plain: dict[str, Any] = {
        "id": header.id,
        "object": "chat.completion" if header.chat else "text_completion",
        "created": header.created,
        "model": header.model,
        "system_fingerprint": header.fingerprint,
        "choices": [
            _plain_choice(header.chat, index, choice, with_token_ids)
            for index, choice in enumerate(choices)
        ],
        "usage": usage.plain(),
    }
    if header.chat and choices[0].prompt_logprobs is not None:
        plain["prompt_logprobs"] = choices[0].prompt_logprobs  # all choices have one prompt
    return _encode(plain)


def _plain_choice(chat: bool, index: int, choice: Choice, with_token_ids: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {"index": index}
    if chat:
        text = {"role": "assistant", "content": choice.text, "refusal": None}
        plain["message"] = choice.message or text
    else:
        plain["text"] = choice.text
    plain["logprobs"] = choice.logprobs
    plain["finish_reason"] = choice.finish_reason
    plain["stop_reason"] = choice.stop
    if with_token_ids:
        plain["token_ids"] = choice.token_ids
        plain["prompt_token_ids"] = choice.prompt_ids
    if not chat and choice.prompt_logprobs is not None:
        plain["prompt_logprobs"] = choice.prompt_logprobs
    return plain


class ChunkWriter:
    """Writes the server-sent events of one stream. `seed`: the first one names it."""

    def __init__(
        self,
        header: Header,
        *,
        with_token_ids: bool,
        include_usage: bool,
        seed: int | None = None,
    ) -> None:
        kind = "chat.completion.chunk" if header.chat else "text_completion"
        head = {
            "id": header.id,
            "object": kind,
            "created": header.created,
            "model": header.model,
            "system_fingerprint": header.fingerprint,
        }
        self._head = b"data: " + _encode(head)[:-1]
        self._tail = (b',"usage":null' if include_usage else b"") + b"}\n\n"
        self._plain_chunk = self._plain_chunk_format()
        self._chat = header.chat
        self._seed = b"" if seed is None else b',"seed":%d' % seed  # until it is named
        self.with_token_ids = with_token_ids

    def set_usage(self, usage: Usage) -> None:
        """From now on every chunk says it."""
        self._tail = b',"usage":%b}\n\n' % _encode(usage.plain())
        self._plain_chunk = self._plain_chunk_format()

    def _plain_chunk_format(self) -> bytes:
        """Of nearly every chunk of a chat: takes the choice's index and its content."""
        begin, end = (part.replace(b"%", b"%%") for part in (self._head, self._tail))
        delta = b'"delta":{"content":%b},"logprobs":null,"finish_reason":null'
        return begin + b',"choices":[{"index":%d,' + delta + b"}]" + end

    def role_chunk(self, index: int, *, content: bool = True) -> bytes:
        """The first chunk of a chat's choice, which has only the role; empty for completions. The
        content is null if there will be none."""
        if not self._chat:
            return b""
        text = b'""' if content else b"null"
        delta = b'"delta":{"role":"assistant","content":%b},"logprobs":null' % text
        seed, self._seed = self._seed, b""
        return b'%b,"choices":[{"index":%d,%b,"finish_reason":null}]%b%b' % (
            self._head,
            index,
            delta,
            seed,
            self._tail,
        )

    def delta_chunk(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        finish: FinishReason | None,
        logprobs: msgspec.Raw | None = None,
        *,
        stop: str | int | None = None,
    ) -> bytes:
        content = _encode(text)
        if finish is None and logprobs is None and self._chat and not self.with_token_ids:
            return self._plain_chunk % (index, content)
        if not self._chat:
            body = b'"text":' + content
        elif text or finish is None:
            body = b'"delta":{"content":' + content + b"}"
        else:
            body = b'"delta":{}'
        reason = None if finish is None else finish.value
        return self.body_chunk(index, body, token_ids, reason, logprobs, stop=stop)

    def body_chunk(
        self,
        index: int,
        body: bytes,
        token_ids: Sequence[int],
        finish_reason: str | None,
        logprobs: msgspec.Raw | None,
        *,
        stop: str | int | None = None,
    ) -> bytes:
        """`body` is the member `"delta":…` of a chat's choice, or `"text":…`. At the choice's end
        `stop` says what stopped it."""
        reason = _encode(finish_reason)
        if finish_reason is not None:
            reason += b',"stop_reason":' + _encode(stop)
        ids = b',"token_ids":' + _encode(token_ids) if self.with_token_ids else b""
        shown = b"null" if logprobs is None else _encode(logprobs)
        seed, self._seed = self._seed, b""
        return b'%b,"choices":[{"index":%d,%b,"logprobs":%b,"finish_reason":%b%b}]%b%b' % (
            self._head,
            index,
            body,
            shown,
            reason,
            ids,
            seed,
            self._tail,
        )

    def usage_chunk(self, usage: Usage) -> bytes:
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, _encode(usage.plain()))


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None) -> bytes:
    plain = {"message": message, "type": kind, "param": param, "code": code}
    return _encode({"error": plain})


def with_request_id(body: bytes, request_id: str) -> bytes:
    """An error's body that also names the request, for whoever reports it."""
    plain = msgspec.json.decode(body)
    plain["error"]["request_id"] = request_id
    return _encode(plain)


def error_event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def model_list(names: Sequence[str], created: int, context_tokens_max: int) -> bytes:
    data = [model_entry(name, created, context_tokens_max) for name in names]
    return _encode({"object": "list", "data": data})


def model_entry(name: str, created: int, context_tokens_max: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "starfish",
        "max_model_len": context_tokens_max,
    }
