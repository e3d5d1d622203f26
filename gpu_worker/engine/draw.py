"""What a row's token depends on besides its logits, and how it changes them: bias, penalties, bans,
a mask, in vLLM's order.

V is the vocabulary, U the distinct tokens that a penalty counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.types import SamplingParams


class TokenCounts:
    """How often each token was generated so far; a token of the prompt alone has 0. It depends on
    the tokens only, so a continuation on another rank has the same counts. Kept as arrays: others
    wait while they are used, which is in every step, and a prompt may be long."""

    __slots__ = ("_counts", "_ids", "_num_of_prompt", "_places", "_size")

    def __init__(self, prompt: Sequence[int], generated: Sequence[int]) -> None:
        self._ids = np.unique(np.fromiter(prompt, dtype=np.intp, count=len(prompt)))
        self._num_of_prompt = self._size = len(self._ids)  # those first are in order
        self._counts = np.zeros(self._size)
        self._places: dict[int, int] = {}  # of the tokens that were generated
        for token in generated:
            self.add(token)

    def add(self, token: int) -> None:
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = self._find_or_append(token)
        self._counts[place] += 1

    def _find_or_append(self, token: int) -> int:
        of_prompt = self._ids[: self._num_of_prompt]
        place = int(np.searchsorted(of_prompt, token))
        if place < len(of_prompt) and of_prompt[place] == token:
            return place
        place, self._size = self._size, self._size + 1
        if place == len(self._ids):
            room = 16 + place // 8
            self._ids = np.concatenate([self._ids, np.zeros(room, dtype=np.intp)])
            self._counts = np.concatenate([self._counts, np.zeros(room)])
        self._ids[place] = token
        return place

    def arrays(self) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """The ids and their counts, `[U]` each; not to be changed."""
        return self._ids[: self._size], self._counts[: self._size]


def count_tokens(
    sampling: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
) -> TokenCounts | None:
    """None if no penalty needs them."""
    if sampling.repetition_penalty != 1.0:
        return TokenCounts(prompt, generated)
    if sampling.presence_penalty or sampling.frequency_penalty:
        return TokenCounts((), generated)
    return None


class LogitBias:
    """What is added to logits, made ready once for all steps of a sequence: it may be a thousand
    ids, and others wait for each step."""

    __slots__ = ("_biases", "_ids")

    def __init__(self, logit_bias: Sequence[tuple[int, float]]) -> None:
        ids, biases = zip(*logit_bias, strict=True)
        self._ids = np.array(ids, dtype=np.int64)
        self._biases = np.array(biases, dtype=np.float64)

    def add_to(self, x_V: NDArray[np.float64]) -> None:
        """An id that comes twice counts twice. Others than the vocabulary's do nothing."""
        is_known = (self._ids >= 0) & (self._ids < len(x_V))
        np.add.at(x_V, self._ids[is_known], self._biases[is_known])


def logit_bias_of(sampling: SamplingParams) -> LogitBias | None:
    return LogitBias(sampling.logit_bias) if sampling.logit_bias else None


class Draw(NamedTuple):
    """`position` is the index of the new token in prompt + emitted; `banned` are ids not to draw;
    `counts` and `bias` are None if the sampling needs none. `allowed` holds a bit for every id that
    may be drawn (bit i % 32 of word i // 32, as grammars give it), or is None: all may."""

    sampling: SamplingParams
    position: int
    banned: tuple[int, ...] = ()
    counts: TokenCounts | None = None
    allowed: NDArray[np.int32] | None = None
    bias: LogitBias | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether the best raw logit may not be the best after the changes."""
        return bool(
            self.banned
            or self.counts is not None
            or self.allowed is not None
            or self.bias is not None
        )


def may_need_logits(sampling: SamplingParams) -> bool:
    """Whether a token of such a request is drawn from its logits on the host, which takes a
    millisecond or more where a vocabulary is large. Where a card draws, it draws all others."""
    return bool(
        sampling.min_p > 0.0
        or sampling.logprobs is not None
        or sampling.logit_bias
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.allowed_token_ids
        or sampling.bad_words
        or sampling.grammar
        or sampling.thinking_budget is not None
    )


def edited_logits(logits_V: NDArray[np.float32], draw: Draw) -> NDArray[np.float64]:
    """A copy in float64, with -inf for what must not be drawn."""
    x_V = logits_V.astype(np.float64)
    sampling = draw.sampling
    if draw.bias is not None:
        draw.bias.add_to(x_V)
    if draw.counts is not None:
        _penalise(x_V, sampling, draw.counts)
    if draw.allowed is not None:
        _mask(x_V, draw.allowed)
    _ban(x_V, draw)
    return x_V


def _penalise(x_V: NDArray[np.float64], sampling: SamplingParams, counts: TokenCounts) -> None:
    ids_U, counts_U = counts.arrays()
    x_U = x_V[ids_U]
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        x_U = np.where(x_U > 0, x_U / penalty, x_U * penalty)
    x_U -= sampling.frequency_penalty * counts_U
    x_U -= sampling.presence_penalty * (counts_U > 0)
    x_V[ids_U] = x_U


def _ban(x_V: NDArray[np.float64], draw: Draw) -> None:
    """Bans yield where a mask allows nothing else: a session must be able to go on."""
    banned = [token for token in draw.banned if 0 <= token < len(x_V)]
    before = x_V[banned]
    x_V[banned] = -np.inf
    if draw.allowed is not None and banned and not np.isfinite(x_V.max()):
        x_V[banned] = before


def _mask(x_V: NDArray[np.float64], allowed: NDArray[np.int32]) -> None:
    """Ids beyond the end of the mask are not allowed: a model's vocabulary may be padded."""
    bits = np.unpackbits(allowed.astype("<i4").view(np.uint8), bitorder="little")[: len(x_V)]
    x_V[: len(bits)][bits == 0] = -np.inf
    x_V[len(bits) :] = -np.inf
