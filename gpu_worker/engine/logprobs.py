"""Log-probabilities of tokens: the log-softmax of the raw logits in float64, one row at a time, so
that the numbers are the same to the bit on every rank and in every chunk.

V is the vocabulary, R the rows of a step's logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.sampler import NO_TOKEN, largest
from gpu_worker.engine.step_plan import StepPlan
from shared.wire import TokenLogprob


class StepScores(NamedTuple):
    """`sampled[i]` belongs to the plan's sampled sequence i: empty if it requested none, or if
    nothing was drawn. `prompt[i]` belongs to `plan.scored[i]`: None if a row has no finite
    maximum."""

    sampled: tuple[tuple[TokenLogprob, ...], ...]
    prompt: tuple[tuple[TokenLogprob, ...] | None, ...]


def score_step(plan: StepPlan, logits_RV: NDArray[np.float32], ids: Items[int]) -> StepScores:
    """The scores that the plan requests of the step's logits. `ids` are the tokens drawn."""
    prompt: list[tuple[TokenLogprob, ...] | None] = []
    row = len(plan.sampled)
    for scored in plan.scored:
        end = row + len(scored.targets)
        prompt.append(_score_rows(logits_RV[row:end], scored.targets, scored.num_top))
        row = end
    if all(draw.sampling.logprobs is None for draw in plan.draws):
        return StepScores(((),) * len(plan.draws), tuple(prompt))
    sampled = [
        ()
        if draw.sampling.logprobs is None or token == NO_TOKEN
        else _score_rows(logits_RV[row : row + 1], (token,), draw.sampling.logprobs) or ()
        for row, (draw, token) in enumerate(zip(plan.draws, ids, strict=True))
    ]
    return StepScores(tuple(sampled), tuple(prompt))


def score(logits_V: NDArray[np.float32], token: int, num_top: int) -> TokenLogprob | None:
    """None if there is no finite maximum. Equals in `top` are sorted by rising id."""
    x_V = logits_V.astype(np.float64)
    peak = x_V.max()
    if not np.isfinite(peak):
        return None
    x_V -= peak
    log_total = math.log(np.exp(x_V).sum())
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        found = largest(x_V, num_top)
        ids = np.arange(len(x_V)) if found is None else found
        ids = ids[np.argsort(-x_V[ids], kind="stable")]
        top = tuple(zip(ids.tolist(), (x_V[ids] - log_total).tolist(), strict=True))
    rank = 1 + int(np.count_nonzero(x_V > x_V[token]))
    return TokenLogprob(logprob=float(x_V[token] - log_total), rank=rank, top=top)


def _score_rows(
    logits_RV: NDArray[np.float32], targets: Items[int], num_top: int
) -> tuple[TokenLogprob, ...] | None:
    scores: list[TokenLogprob] = []
    for logits_V, token in zip(logits_RV, targets, strict=True):
        scored = score(logits_V, token, num_top)
        if scored is None:
            return None
        scores.append(scored)
    return tuple(scores)
