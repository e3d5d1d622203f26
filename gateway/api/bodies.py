"""The request bodies that the API reads. Unknown fields are ignored, because clients send many that
change nothing here. A field that would change the answer but is not supported is in
`UNSUPPORTED`."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from shared.errors import RequestError

B = TypeVar("B", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """The fields of both endpoints."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    n: int | None = None
    best_of: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: dict[int, float] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    priority: int | None = None
    timeout: float | None = None
    cache_salt: str | None = None
    # Read only to be rejected:
    use_beam_search: Any = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | list[Any] = msgspec.field()
    echo: bool | None = None
    logprobs: int | None = None
    suffix: Any = None
    top_logprobs: Any = None  # a field of chats


class TextPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None


class ChatBody(GenerationBody, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
}
"""Field → the values, besides null, that have no effect and are therefore accepted."""


def decode_body(raw: bytes, cls: type[B]) -> B:
    """Raises RequestError if the body is not JSON, has a wrong type, or asks for what is not
    supported."""
    try:
        body = msgspec.json.decode(raw, type=cls)
    except msgspec.ValidationError as error:
        raise RequestError(str(error), param=_param(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error
    if isinstance(body, GenerationBody):
        refuse_unsupported(body)
    return body


def refuse_unsupported(body: GenerationBody) -> None:
    for name in body.__struct_fields__:
        plain = UNSUPPORTED.get(name)
        if plain is None:
            continue
        value = getattr(body, name)
        if value is None or any(_same(value, allowed) for allowed in plain):
            continue
        raise RequestError(f"{name}={value!r:.60} is not supported; leave it out", param=name)
    if isinstance(body, CompletionBody) and body.top_logprobs is not None:
        raise RequestError(
            "top_logprobs is for chats; pass the number as `logprobs`", param="top_logprobs"
        )
    if isinstance(body, ChatBody) and body.tools and body.tool_choice != "none":
        raise RequestError(
            "tool calls are not supported; leave `tools` out, or pass tool_choice='none'",
            param="tools",
        )


def _same(value: Any, allowed: Any) -> bool:
    """Compares without taking 0 for False."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)


def _param(text: str) -> str | None:
    """The field that msgspec's message names: "… - at `$.stop[0]`"."""
    found = re.search(r"\$\.(\w+)", text) or re.search(r"required field `(\w+)`", text)
    return found.group(1) if found else None
