"""The request bodies that the API reads: the fields that are served. What becomes of all others,
`request_fields` says."""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar, get_args

import msgspec

from gateway.api.request_fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    STREAM_OPTIONS,
    RequestField,
    Support,
)
from shared.errors import RequestError

B = TypeVar("B", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class AnswerFields(msgspec.Struct, kw_only=True):
    """What means the same in every API that asks for an answer."""

    min_tokens: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: Any = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    priority: int | None = None
    timeout: float | None = None
    cache_salt: str | None = None


class GenerationBody(AnswerFields, kw_only=True):
    """The fields of both endpoints."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    return_token_ids: bool | None = None
    n: int | None = None
    best_of: int | None = None
    prompt_logprobs: int | None = None
    response_format: Any = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | list[Any] = msgspec.field()
    echo: bool | None = None
    logprobs: int | None = None


class ChatBody(GenerationBody, kw_only=True):
    messages: list[Any]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    thinking: Any = None
    thinking_token_budget: int | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None


class DialectBody(AnswerFields, kw_only=True):
    """The body of another API that asks for a chat. Other fields of chats' bodies are refused if
    they would change the answer. `instead`: what this API has in place of one."""

    instead: ClassVar[Mapping[str, str]] = {}

    def answer_fields(self) -> dict[str, Any]:
        """Those of the chat that are the same there."""
        values = {name: getattr(self, name) for name in AnswerFields.__struct_fields__}
        return {name: value for name, value in values.items() if value is not None}


IGNORED_NAMES_MAX = 32
"""So many unknown fields are named."""

UNSUPPORTED_FIELD = "unsupported_field"
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "return_token_ids": (False,),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "thinking_token_budget": (-1,),
}
"""Values with which fields of chats ask for nothing."""

_UNPRINTABLE = re.compile(r"[^\w.\-]", re.ASCII)


def decode_body(raw: bytes, cls: type[B]) -> B:
    """Raises RequestError if the body is not JSON, has a wrong type, or asks for what is not
    supported."""
    with _refusing_malformed():
        body = msgspec.json.decode(raw, type=cls)
        if issubclass(cls, GenerationBody):
            refuse_unsupported(raw, cls)
        elif issubclass(cls, DialectBody):
            _refuse_chat_fields(raw, cls)
    return body


@contextmanager
def _refusing_malformed() -> Iterator[None]:
    """Raises RequestError for what the decoder raises. Of a field that no class has it checks no
    more than its form, so that its name may fail to be a text only when this is asked for."""
    try:
        yield
    except msgspec.ValidationError as error:
        raise RequestError(str(error), param=_param(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error


def refuse_unsupported(raw: bytes, cls: type[GenerationBody]) -> None:
    known = fields_of(cls)
    for name, value in _values(raw).items():
        about = known.get(name)
        if about is None or about.support is not Support.REFUSED:
            continue
        if _asks_for_something(value, about.neutral):
            advice = about.note or "leave it out"
            raise RequestError(f"{name} is not supported: {advice}", param=name)


def _refuse_chat_fields(raw: bytes, cls: type[DialectBody]) -> None:
    for name, value in _values(raw, without=cls.__struct_fields__).items():
        about = CHAT_FIELDS.get(name)
        if about is None or about.support is Support.HARMLESS:
            continue
        if _asks_for_something(value, (*about.neutral, *_DEFAULTS.get(name, ()))):
            own = cls.instead.get(name)
            advice = f"use {own}" if own else "it is a field of /v1/chat/completions"
            raise RequestError(
                f"{name} is not supported here: {advice}", param=name, code=UNSUPPORTED_FIELD
            )


def _asks_for_something(value: msgspec.Raw, neutral: Iterable[Any]) -> bool:
    plain = msgspec.json.decode(value)
    return plain is not None and not any(_same(plain, each) for each in neutral)


def ignored_fields(raw: bytes, cls: type[msgspec.Struct]) -> list[str]:
    """Names of fields that no API has, fit for a header: they may be misspelt. `raw` has been
    decoded as `cls`. Raises RequestError if a name is not a text."""
    known: Container[str] = frozenset(cls.__struct_fields__)
    if issubclass(cls, GenerationBody):
        known = fields_of(cls)
    with _refusing_malformed():
        values = _values(raw)
        names = [name for name in values if name not in known]
        for name, inner in _inner_fields(cls).items():
            if name in values:
                names += [f"{name}.{each}" for each in _values(values[name], inner)]
    return [_UNPRINTABLE.sub("?", name)[:64] for name in names[:IGNORED_NAMES_MAX]]


@functools.cache
def _inner_fields(cls: type[msgspec.Struct]) -> dict[str, Container[str]]:
    """The fields of a body that are objects of known fields themselves, with these."""
    inner: dict[str, Container[str]] = {}
    for field in msgspec.structs.fields(cls):
        for each in get_args(field.type):
            if isinstance(each, type) and issubclass(each, msgspec.Struct):
                inner[field.encode_name] = each.__struct_fields__
    if issubclass(cls, GenerationBody):
        inner["stream_options"] = STREAM_OPTIONS
    return inner


def fields_of(cls: type[GenerationBody]) -> dict[str, RequestField]:
    return CHAT_FIELDS if cls is ChatBody else COMPLETION_FIELDS


def _values(
    raw: bytes | msgspec.Raw, without: Container[str] = frozenset()
) -> dict[str, msgspec.Raw]:
    """The fields of an object, not decoded; none for null."""
    values = msgspec.json.decode(raw, type=dict[str, msgspec.Raw] | None) or {}
    return {name: value for name, value in values.items() if name not in without}


def _same(value: Any, allowed: Any) -> bool:
    """Compares without taking 0 for False."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)


def _param(text: str) -> str | None:
    """The field that msgspec's message names: "… - at `$.stop[0]`"."""
    found = re.search(r"\$\.(\w+)", text) or re.search(r"required field `(\w+)`", text)
    return found.group(1) if found else None
