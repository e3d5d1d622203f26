"""OpenAI's shapes of log-probabilities, and the shape of vLLM's `prompt_logprobs`. A token appears
as a text and as its bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from gateway.api.token_offsets import TokenOffsets
from gateway.detokenizer import TokenNames
from gateway.prompt import SentText
from shared.wire import TokenLogprob

LOGPROB_MIN = -9999.0
"""OpenAI's value for "impossible", because JSON has no infinity."""

ScoredToken = tuple[int, TokenLogprob | None]
"""A token and its log-probability; None for the first token of a prompt."""


def chat_logprobs(names: TokenNames, scored: Sequence[ScoredToken], num_top: int) -> dict[str, Any]:
    return {"content": [_chat_token(names, *each, num_top) for each in scored], "refusal": None}


def _chat_token(
    names: TokenNames, token: int, logprob: TokenLogprob | None, num_top: int
) -> dict[str, Any]:
    assert logprob is not None, "a chat shows no prompt"
    top = [_chat_entry(names, *each) for each in logprob.top[:num_top]]
    return {**_chat_entry(names, token, logprob.logprob), "top_logprobs": top}


def _chat_entry(names: TokenNames, token: int, logprob: float) -> dict[str, Any]:
    raw = list(names.name_bytes.join((token,)))
    return {"token": names.name(token), "logprob": _finite(logprob), "bytes": raw}


class CompletionLogprobs:
    """The log-probabilities of one choice, piece by piece. Offsets count characters from the start
    of its whole text. `echoed`: the text begins with it, and the first tokens are those of it.
    `follows`: the ids before the first one whose text is decoded."""

    def __init__(
        self,
        names: TokenNames,
        num_top: int,
        *,
        follows: Sequence[int] = (),
        echoed: SentText | None = None,
    ) -> None:
        self._names = names
        self._num_top = num_top
        self._echoed_starts = deque(echoed.starts if echoed else ())
        begin = len(echoed.text) if echoed else 0
        self._offsets = TokenOffsets(names.text, follows=follows, begin=begin)

    def next(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        offsets = [self._next_offset(token) for token, _ in scored]
        return {
            "tokens": [self._names.unique_name(token) for token, _ in scored],
            "token_logprobs": [each and _finite(each.logprob) for _, each in scored],
            "top_logprobs": [each and self._top(token, each) for token, each in scored],
            "text_offset": offsets,
        }

    def _next_offset(self, token: int) -> int:
        if self._echoed_starts:
            return self._echoed_starts.popleft()
        return self._offsets.next(token)

    def _top(self, token: int, logprob: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and the token itself, by name."""
        entries = (*logprob.top[: self._num_top], (token, logprob.logprob))
        top: dict[str, float] = {}
        for each, value in entries:
            top.setdefault(self._names.unique_name(each), _finite(value))
        return top


def prompt_logprobs(
    names: TokenNames, prompt: Sequence[int], scores: Sequence[TokenLogprob], num_top: int
) -> list[dict[str, Any] | None]:
    """By token id; null for the prompt's first token."""
    shaped: list[dict[str, Any] | None] = [None]
    for token, logprob in zip(prompt[1:], scores, strict=True):
        entries = [
            (each, value, place)
            for place, (each, value) in enumerate(logprob.top[:num_top], start=1)
            if each != token
        ]
        entries.append((token, logprob.logprob, logprob.rank))
        shaped.append(
            {
                str(each): {
                    "logprob": _finite(value),
                    "rank": place,
                    "decoded_token": names.name(each),
                }
                for each, value, place in sorted(entries, key=lambda entry: entry[2])
            }
        )
    return shaped


def _finite(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN)
