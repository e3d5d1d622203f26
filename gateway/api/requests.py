"""From a decoded body to what shall be generated: prompts, sampling, limits. Raises RequestError
with OpenAI's `param` for every value that cannot be."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway.api.bodies import ChatBody, ChatMessage, CompletionBody, GenerationBody
from gateway.tokenizer import context_exceeded
from shared.errors import RequestError
from shared.types import SamplingParams

COMPLETION_TOKENS_DEFAULT = 16
STOPS_MAX = 16
STOP_CHARS_MAX = 1024
STOP_IDS_MAX = 128
PROMPTS_MAX = 64
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    vocab_size: int
    context_tokens_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a request asks for besides its prompt. `max_tokens` is None where the client set none:
    then the context's end, or the endpoint's default, bounds it."""

    sampling: SamplingParams
    max_tokens: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool

    def sampling_for(self, num_prompt_tokens: int, limits: ModelLimits) -> SamplingParams:
        """Raises RequestError where prompt and completion do not fit into the context."""
        room = limits.context_tokens_max - num_prompt_tokens
        wanted = self.max_tokens
        if room < 1 or (wanted is not None and wanted > room):
            raise context_exceeded(num_prompt_tokens + (wanted or 1), limits.context_tokens_max)
        max_tokens = room if wanted is None else wanted
        min_tokens = min(self.sampling.min_tokens, max_tokens)
        return replace(self.sampling, max_tokens=max_tokens, min_tokens=min_tokens)


def read_wish(body: GenerationBody, limits: ModelLimits) -> Wish:
    max_tokens = _max_tokens(body)
    min_tokens = _within("min_tokens", body.min_tokens, 0, 0, max_tokens or _INT64_MAX)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is for stream=true only", param="stream_options")
    sampling = SamplingParams(
        temperature=_within("temperature", body.temperature, 1.0, 0.0, 2.0),
        top_p=_within("top_p", body.top_p, 1.0, 0.0, 1.0),
        top_k=max(0, _within("top_k", body.top_k, 0, -1, _INT64_MAX)),
        seed=_seed(body.seed),
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=_stop_ids(body.stop_token_ids, limits.vocab_size),
    )
    return Wish(
        sampling=sampling,
        max_tokens=max_tokens,
        stops=_stops(body.stop),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        return_token_ids=bool(body.return_token_ids),
    )


def read_prompts(body: CompletionBody, vocab_size: int) -> list[str | tuple[int, ...]]:
    """A text, a list of token ids, or a list of either: one choice per prompt."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(type(item) is int for item in prompt):
        return [_token_prompt(prompt, vocab_size)]
    if not prompt or len(prompt) > PROMPTS_MAX:
        raise RequestError(f"prompt must hold 1 … {PROMPTS_MAX} prompts", param="prompt")
    return [item if isinstance(item, str) else _token_prompt(item, vocab_size) for item in prompt]


def read_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """As chat templates want them: content is one text."""
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise RequestError(
                    f"content of type {part.type!r} is not supported, only text", param="messages"
                )
        content = "".join(part.text or "" for part in content)
    plain: dict[str, Any] = {"role": message.role, "content": content or ""}
    extra = {"name": message.name, "tool_call_id": message.tool_call_id}
    plain.update({key: value for key, value in extra.items() if value is not None})
    if message.tool_calls:
        plain["tool_calls"] = message.tool_calls
    return plain


def _token_prompt(prompt: Any, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(prompt, list) or not all(type(item) is int for item in prompt) or not prompt:
        raise RequestError("a prompt is a text or a list of token ids", param="prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise RequestError(f"token ids must lie in 0 … {vocab_size - 1}", param="prompt")
    return tuple(prompt)


def _max_tokens(body: GenerationBody) -> int | None:
    name, value = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        name, value = "max_completion_tokens", body.max_completion_tokens
    if value is None:
        return COMPLETION_TOKENS_DEFAULT if isinstance(body, CompletionBody) else None
    checked: int = _within(name, value, 0, 1, _INT64_MAX)
    return checked


def _within(name: str, value: Any, default: Any, low: Any, high: Any) -> Any:
    if value is None:
        return default
    if not low <= value <= high:
        upper = f" and at most {high}" if high != _INT64_MAX else ""
        raise RequestError(f"{name} must be at least {low}{upper}, but is {value}", param=name)
    return value


def _seed(seed: int | None) -> int:
    """Any 64-bit number of either sign; drawn where the client has none."""
    if seed is None:
        return secrets.randbits(63)
    if not -(2**63) <= seed < 2**64:
        raise RequestError("seed must be a 64-bit integer", param="seed")
    return seed % 2**64


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > STOPS_MAX:
        raise RequestError(f"at most {STOPS_MAX} stop strings are supported", param="stop")
    if any(not text or len(text) > STOP_CHARS_MAX for text in stops):
        message = f"a stop string must have 1 … {STOP_CHARS_MAX} characters"
        raise RequestError(message, param="stop")
    return stops


def _stop_ids(ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    if not ids:
        return ()
    if len(ids) > STOP_IDS_MAX or min(ids) < 0 or max(ids) >= vocab_size:
        message = f"stop_token_ids: at most {STOP_IDS_MAX} ids of 0 … {vocab_size - 1}"
        raise RequestError(message, param="stop_token_ids")
    return tuple(sorted(set(ids)))
