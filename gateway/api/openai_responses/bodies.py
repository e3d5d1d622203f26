"""The body of `/v1/responses`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from gateway.api.bodies import DialectBody
from shared.errors import RequestError


class ReasoningOptions(msgspec.Struct, kw_only=True):
    """Of the reasoning all is shown, whatever the summary."""

    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None
    # Read only to be rejected:
    context: Any = None
    mode: Any = None


class TextOptions(msgspec.Struct, kw_only=True):
    format: dict[str, Any] | None = None
    verbosity: Any = None


class ResponseStreamOptions(msgspec.Struct, kw_only=True):
    """Nothing is added to events."""

    include_obfuscation: bool | None = None


class ResponsesBody(DialectBody, kw_only=True):
    """`input` is a text or a list of items."""

    instead: ClassVar[Mapping[str, str]] = {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "reasoning_effort": "reasoning",
        "response_format": "text",
    }

    input: str | list[Any]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None  # ours: that API has none
    stop: str | list[str] | None = None  # ours, too
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    truncation: str | None = None
    include: list[str] | None = None
    # They change nothing in the answer:
    stream_options: ResponseStreamOptions | None = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    access_programs: Any = None
    background_options: Any = None
    # Read only to be rejected:
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None
    context_management: Any = None
    moderation: Any = None
    image: Any = None


_ABSENT = {
    "background": "answers come on the connection that asks for them",
    "conversation": "pass previous_response_id, or the whole input",
    "prompt": "templates of prompts are not kept here",
    "max_tool_calls": "tools run at the client",
    "top_logprobs": "ask /v1/chat/completions for log-probabilities",
    "context_management": "the model reads the whole input; send less of it",
    "moderation": "this instance judges no texts",
    "image": "only text is served",
}
_PLAIN = {
    "text": {"verbosity": (None, "medium")},
    "reasoning": {"context": (None, "auto"), "mode": (None, "standard")},
}
"""Fields of objects of the body that would change the answer, with what asks for nothing."""
_INCLUDABLE = ("reasoning.encrypted_content", "message.output_text.logprobs")


def refuse_unsupported(body: ResponsesBody) -> None:
    """Raises RequestError."""
    for name, why in _ABSENT.items():
        if getattr(body, name):
            raise RequestError(f"{name} is not supported: {why}", param=name)
    for param, fields in _PLAIN.items():
        for name, plain in fields.items():
            if getattr(getattr(body, param), name, None) not in plain:
                raise RequestError(f"{param}.{name} is not supported; leave it out", param=param)
    if body.truncation not in (None, "disabled", "auto"):
        raise RequestError("truncation must be auto or disabled", param="truncation")
    for name in body.include or ():
        if name not in _INCLUDABLE[:1]:
            raise RequestError(f"include: {name!r:.80} is not supported", param="include")
