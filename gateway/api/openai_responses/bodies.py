"""The body of `/v1/responses`."""

from __future__ import annotations

from typing import Any

import msgspec

from shared.errors import RequestError


class ReasoningOptions(msgspec.Struct, kw_only=True):
    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None


class TextOptions(msgspec.Struct, kw_only=True):
    format: dict[str, Any] | None = None
    verbosity: Any = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    """`input` is a text or a list of items."""

    input: str | list[Any]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None  # ours: that API has none
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
    # Read only to be rejected:
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None


_ABSENT = {
    "background": "answers come on the connection that asks for them",
    "conversation": "pass previous_response_id, or the whole input",
    "prompt": "templates of prompts are not kept here",
    "max_tool_calls": "tools run at the client",
    "top_logprobs": "ask /v1/chat/completions for log-probabilities",
}
_INCLUDABLE = ("reasoning.encrypted_content", "message.output_text.logprobs")


def refuse_unsupported(body: ResponsesBody) -> None:
    """Raises RequestError."""
    for name, why in _ABSENT.items():
        if getattr(body, name):
            raise RequestError(f"{name} is not supported: {why}", param=name)
    if body.truncation not in (None, "disabled", "auto"):
        raise RequestError("truncation must be auto or disabled", param="truncation")
    for name in body.include or ():
        if name not in _INCLUDABLE[:1]:
            raise RequestError(f"include: {name!r:.80} is not supported", param="include")
