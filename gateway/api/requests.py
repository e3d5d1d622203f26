"""Turns a decoded body into what to generate: prompts, sampling, limits. Raises RequestError with
OpenAI's `param` for every impossible value."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from gateway.api.bodies import ChatBody, CompletionBody, GenerationBody, StreamOptions
from gateway.api.fields import (
    INT64_MAX,
    allowed_ids_of,
    check_range,
    checked_top_logprobs,
    logit_bias_of,
    seed_of,
    stop_ids_of,
    stops_of,
)
from gateway.api.resumption import Stream
from gateway.api.truncation import Truncation, truncation_of
from gateway.context_limit import context_exceeded
from gateway.prompt import Prompt
from gateway.served_model import ModelLimits
from shared.errors import RequestError
from shared.types import SamplingParams

COMPLETION_TOKENS_DEFAULT = 16
PROMPTS_MAX = 64
CHOICES_MAX = 256
"""Limit on prompts times `n` of one request."""


class ChoiceSize(NamedTuple):
    num_prompt_tokens: int
    max_tokens: int


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for besides its prompt. If `max_tokens` is None, the end of the context
    is the limit. `num_choices` counts the choices of each prompt. `prompt_logprobs` is the
    request's field; `sampling.prompt_logprobs` also covers what `echo` needs.
    """

    sampling: SamplingParams
    max_tokens: int | None
    num_choices: int
    prompt_logprobs: int | None
    stops: tuple[str, ...]
    echo: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    truncation: Truncation | None
    return_token_ids: bool
    include_stop: bool
    include_special: bool

    def prompt_tokens_max(self, limits: ModelLimits) -> int:
        """How long a prompt may be that is not truncated yet."""
        return limits.context_tokens_max if self.truncation is None else INT64_MAX

    def fitted(self, prompt: Prompt, limits: ModelLimits) -> Prompt:
        if self.truncation is None:
            return prompt
        least = 1 if self.max_tokens is None else self.max_tokens
        return self.truncation.apply(prompt, room=limits.context_tokens_max - least)

    def guided_by(self, grammar: str, *, forces_call: bool = False) -> RequestOptions:
        """A call that is forced ends where its grammar does, and nowhere before."""
        if not (grammar or forces_call):
            return self
        guided = replace(self.sampling, grammar=grammar)
        if not forces_call:
            return replace(self, sampling=guided)
        return replace(self, stops=(), sampling=replace(guided, stop_token_ids=()))

    def of_stream(self, stream: Stream | None, seed: int | None) -> RequestOptions:
        """`seed` is the client's. Without one a stream that can be resumed has a seed of its
        own."""
        if stream is None or seed is not None:
            return self
        return replace(self, sampling=replace(self.sampling, seed=stream.seed))

    def sampling_for(
        self, num_prompt_tokens: int, limits: ModelLimits, choice: int = 0
    ) -> SamplingParams:
        """The parameters of choice number `choice` of a prompt. Its first choice alone has the
        prompt scored, unless each echoes it. Raises RequestError if prompt and completion do not
        fit into the context."""
        room = limits.context_tokens_max - num_prompt_tokens
        wanted = self.max_tokens
        least = 1 if wanted is None else wanted
        if least > room:
            raise context_exceeded(num_prompt_tokens + least, limits.context_tokens_max)
        max_tokens = room if wanted is None else wanted
        min_tokens = min(self.sampling.min_tokens, max_tokens)
        seed = choice_seed(self.sampling.seed, choice)
        is_scored = choice == 0 or self.echo
        return replace(
            self.sampling,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            seed=seed,
            prompt_logprobs=self.sampling.prompt_logprobs if is_scored else None,
        )


def choice_seed(seed: int, choice: int) -> int:
    """The first choice has the request's seed, so it is the same as without other choices."""
    if choice == 0:
        return seed
    mixed = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little")


def read_options(body: GenerationBody, limits: ModelLimits) -> RequestOptions:
    max_tokens = _max_tokens(body)
    min_max = INT64_MAX if max_tokens is None else max_tokens
    min_tokens = check_range("min_tokens", body.min_tokens, 0, 0, min_max)
    logprobs, echo = _logprobs(body), isinstance(body, CompletionBody) and bool(body.echo)
    prompt_logprobs = _prompt_logprobs(body)
    wanted = [prompt_logprobs, logprobs if echo else None]
    stream_options = body.stream_options or StreamOptions()
    include_usage = bool(stream_options.include_usage)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true", param="stream_options")
    sampling = SamplingParams(
        temperature=check_range("temperature", body.temperature, 1.0, 0.0, 2.0),
        top_p=check_range("top_p", body.top_p, 1.0, 0.0, 1.0),
        top_k=max(0, check_range("top_k", body.top_k, 0, -1, INT64_MAX)),
        seed=seed_of(body.seed),
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        min_p=check_range("min_p", body.min_p, 0.0, 0.0, 1.0),
        presence_penalty=check_range("presence_penalty", body.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=check_range("frequency_penalty", body.frequency_penalty, 0.0, -2.0, 2.0),
        repetition_penalty=check_range(
            "repetition_penalty", body.repetition_penalty, 1.0, 0.01, 100.0
        ),
        logit_bias=logit_bias_of(body.logit_bias, limits.vocab_size),
        logprobs=logprobs,
        prompt_logprobs=max((k for k in wanted if k is not None), default=None),
        stop_token_ids=stop_ids_of(body.stop_token_ids, limits.vocab_size),
        allowed_token_ids=allowed_ids_of(body.allowed_token_ids, limits.vocab_size),
    )
    return RequestOptions(
        sampling=sampling,
        max_tokens=max_tokens,
        num_choices=_num_choices(body),
        prompt_logprobs=prompt_logprobs,
        stops=stops_of(body.stop),
        echo=echo,
        stream=bool(body.stream),
        include_usage=include_usage,
        continuous_usage=include_usage and bool(stream_options.continuous_usage_stats),
        truncation=truncation_of(body.truncate_prompt_tokens, body.truncation_side, limits),
        return_token_ids=bool(body.return_token_ids),
        include_stop=bool(body.include_stop_str_in_output),
        include_special=body.skip_special_tokens is False,
    )


def read_prompts(body: CompletionBody, vocab_size: int) -> list[str | tuple[int, ...]]:
    """`prompt` is a text, a list of token ids, or a list of either."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(type(item) is int for item in prompt):
        return [_token_prompt(prompt, vocab_size)]
    if not prompt or len(prompt) > PROMPTS_MAX:
        raise RequestError(f"prompt must have 1 to {PROMPTS_MAX} prompts", param="prompt")
    return [item if isinstance(item, str) else _token_prompt(item, vocab_size) for item in prompt]


def check_num_logprobs(options: RequestOptions, choices: Sequence[ChoiceSize], most: int) -> None:
    """Raises RequestError if these choices of a request may show more than `most`
    log-probabilities. Those of a stream's completion are never all here at once."""
    of_prompt, of_token = options.sampling.prompt_logprobs, options.sampling.logprobs
    of_prompts = of_tokens = 0
    for num_prompt, max_tokens in choices:
        of_prompts += 0 if of_prompt is None else num_prompt * (of_prompt + 1)
        if of_token is not None and not options.stream:
            of_tokens += max_tokens * (of_token + 1)
    if of_prompts + of_tokens > most:
        raise RequestError(
            f"the request may show {of_prompts + of_tokens} log-probabilities, but the limit is "
            f"{most}: ask for fewer likeliest tokens, choices or tokens",
            param="prompt_logprobs" if of_prompts > of_tokens else "logprobs",
        )


def _token_prompt(prompt: Any, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(prompt, list) or not all(type(item) is int for item in prompt) or not prompt:
        raise RequestError("a prompt must be a string or a list of token ids", param="prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise RequestError(f"token ids must be from 0 to {vocab_size - 1}", param="prompt")
    return tuple(prompt)


def _max_tokens(body: GenerationBody) -> int | None:
    name, value = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        name, value = "max_completion_tokens", body.max_completion_tokens
    if value is None:
        return COMPLETION_TOKENS_DEFAULT if isinstance(body, CompletionBody) else None
    only_prompt = body.prompt_logprobs is not None or (
        isinstance(body, CompletionBody) and bool(body.echo)
    )
    if value == 0 and not only_prompt:
        raise RequestError(f"{name}=0 needs echo or prompt_logprobs", param=name)
    checked: int = check_range(name, value, 0, 0, INT64_MAX)
    return checked


def _num_choices(body: GenerationBody) -> int:
    number: int = check_range("n", body.n, 1, 1, 128)
    if body.best_of is not None and body.best_of != number:
        raise RequestError("best_of must equal n; leave it out", param="best_of")
    return number


def _logprobs(body: GenerationBody) -> int | None:
    """How many likeliest tokens to show; None: no log-probabilities. A chat has two fields for
    it."""
    if isinstance(body, CompletionBody):
        return checked_top_logprobs("logprobs", body.logprobs)
    if not isinstance(body, ChatBody):
        return None
    top = checked_top_logprobs("top_logprobs", body.top_logprobs)
    if not body.logprobs:
        if top:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        return None
    return top or 0


def _prompt_logprobs(body: GenerationBody) -> int | None:
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs needs stream=false", param="prompt_logprobs")
    return checked_top_logprobs("prompt_logprobs", body.prompt_logprobs)
