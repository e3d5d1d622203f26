"""OpenAI's shapes of log-probabilities, and the shape of vLLM's `prompt_logprobs`, as JSON. A token
appears as a text and as its bytes. Long lists are made in slices, between which the event loop
serves others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from gateway.api.json_list import JsonList
from gateway.api.token_offsets import TokenOffsets
from gateway.detokenizer import TokenNames
from gateway.prompt import SentText
from shared.wire import TokenLogprob

LOGPROB_MIN = -9999.0
"""OpenAI's value for "impossible", because JSON has no infinity."""

SLICE_ENTRIES = 400
"""Log-probabilities that are shaped in one go: one or two milliseconds."""

ScoredToken = tuple[int, TokenLogprob | None]
"""A token and its log-probability; None for the first token of a prompt."""

_encode = msgspec.json.encode


async def chat_logprobs(
    names: TokenNames, scored: Sequence[ScoredToken], num_top: int
) -> msgspec.Raw:
    content = JsonList()
    async for begin, end in _slices(len(scored), num_top):
        content.add([_chat_token(names, *each, num_top) for each in scored[begin:end]])
    return msgspec.Raw(b'{"content":%b,"refusal":null}' % content.whole())


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

    async def next(self, scored: Sequence[ScoredToken]) -> msgspec.Raw:
        tokens, logprobs, tops, offsets = (JsonList() for _ in range(4))
        async for begin, end in _slices(len(scored), self._num_top):
            part = scored[begin:end]
            tokens.add([self._names.unique_name(token) for token, _ in part])
            logprobs.add([each and _finite(each.logprob) for _, each in part])
            tops.add([each and self._top(token, each) for token, each in part])
            offsets.add([self._next_offset(token) for token, _ in part])
        return msgspec.Raw(
            b'{"tokens":%b,"token_logprobs":%b,"top_logprobs":%b,"text_offset":%b}'
            % (tokens.whole(), logprobs.whole(), tops.whole(), offsets.whole())
        )

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


class PromptLogprobs:
    """Those of one prompt, for all its choices: by token id; null for its first token."""

    def __init__(self, names: TokenNames, prompt: Sequence[int], num_top: int) -> None:
        self._names = names
        self._prompt = prompt
        self._num_top = num_top
        self._scores: list[TokenLogprob] = []
        self._shaped: msgspec.Raw | None = None

    def add(self, scores: Sequence[TokenLogprob]) -> None:
        self._scores += scores

    async def shaped(self) -> msgspec.Raw:
        """Call it once all are known."""
        if self._shaped is None:
            scored = list(zip(self._prompt[1:], self._scores, strict=True))
            entries = JsonList([None])
            async for begin, end in _slices(len(scored), self._num_top):
                entries.add([self._by_id(*each) for each in scored[begin:end]])
            self._shaped = msgspec.Raw(entries.whole())
        return self._shaped

    def _by_id(self, token: int, logprob: TokenLogprob) -> dict[str, Any]:
        entries = [
            (each, value, place)
            for place, (each, value) in enumerate(logprob.top[: self._num_top], start=1)
            if each != token
        ]
        entries.append((token, logprob.logprob, logprob.rank))
        return {
            str(each): {
                "logprob": _finite(value),
                "rank": place,
                "decoded_token": self._names.name(each),
            }
            for each, value, place in sorted(entries, key=lambda entry: entry[2])
        }


async def _slices(num_tokens: int, num_top: int) -> AsyncIterator[tuple[int, int]]:
    """The bounds of slices of `num_tokens` tokens. The event loop runs between two of them."""
    step = max(1, SLICE_ENTRIES // (num_top + 1))
    for begin in range(0, num_tokens, step):
        if begin:
            await asyncio.sleep(0)
        yield begin, min(begin + step, num_tokens)


def _finite(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN)
