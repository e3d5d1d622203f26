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
    the tokens only, so a continuation on another rank has the same counts."""

    __slots__ = ("_counts",)

    def __init__(self, prompt: Sequence[int], generated: Sequence[int]) -> None:
        self._counts: dict[int, int] = dict.fromkeys(prompt, 0)
        for token in generated:
            self.add(token)

    def add(self, token: int) -> None:
        self._counts[token] = self._counts.get(token, 0) + 1

    def arrays(self) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """The ids and their counts, `[U]` each."""
        counts = self._counts
        ids_U = np.fromiter(counts.keys(), dtype=np.intp, count=len(counts))
        return ids_U, np.fromiter(counts.values(), dtype=np.float64, count=len(counts))


def count_tokens(
    sampling: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
) -> TokenCounts | None:
    """None if no penalty needs them."""
    if sampling.repetition_penalty != 1.0:
        return TokenCounts(prompt, generated)
    if sampling.presence_penalty or sampling.frequency_penalty:
        return TokenCounts((), generated)
    return None


class Draw(NamedTuple):
    """`position` is the index of the new token in prompt + emitted; `banned` are ids not to draw;
    `counts` is None if no penalty needs it. `allowed` holds a bit for every id that may be drawn
    (bit i % 32 of word i // 32, as grammars give it), or is None: all may."""

    sampling: SamplingParams
    position: int
    banned: tuple[int, ...] = ()
    counts: TokenCounts | None = None
    allowed: NDArray[np.int32] | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether the best raw logit may not be the best after the changes."""
        return bool(
            self.banned
            or self.counts is not None
            or self.allowed is not None
            or self.sampling.logit_bias
        )


def edited_logits(logits_V: NDArray[np.float32], draw: Draw) -> NDArray[np.float64]:
    """A copy in float64, with -inf for what must not be drawn."""
    x_V = logits_V.astype(np.float64)
    sampling = draw.sampling
    for token, bias in sampling.logit_bias:
        if 0 <= token < len(x_V):
            x_V[token] += bias
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
