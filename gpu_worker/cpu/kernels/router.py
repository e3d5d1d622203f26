"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_worker.cpu.kernels.arithmetic import ONE, ZERO, exp32, kernel
from gpu_worker.cpu.kernels.linear import linear, softmax
from gpu_worker.cpu.kernels.warm_up import (
    FLAG,
    FLOAT,
    FLOATS_1D,
    FLOATS_2D,
    INT,
    INTS_2D,
    EntryPoint,
)

_TINY = np.float32(1e-20)
"""Added to a sum of weights so that it is never zero, as in the reference implementation."""


@kernel
def _top_k(scores_E: Any, experts_K: Any) -> None:
    """The experts with the largest scores, in falling order; the lower expert first among
    equals."""
    top_k, held = experts_K.shape[0], 0
    for e in range(scores_E.shape[0]):
        if held == top_k and not scores_E[e] > scores_E[experts_K[top_k - 1]]:
            continue
        k = min(held, top_k - 1)
        while k > 0 and scores_E[e] > scores_E[experts_K[k - 1]]:
            experts_K[k] = experts_K[k - 1]
            k -= 1
        experts_K[k] = e
        held = min(held + 1, top_k)


@kernel
def _scale_weights(weights_K: Any, normalise: bool, tiny: Any, factor: Any) -> None:
    if normalise:
        total = ZERO
        for k in range(weights_K.shape[0]):
            total += weights_K[k]
        total += tiny
        for k in range(weights_K.shape[0]):
            weights_K[k] /= total
    for k in range(weights_K.shape[0]):
        weights_K[k] *= factor


@kernel
def route_softmax(
    h_TH: Any, w_router: Any, zeros: Any, normalise: bool, logits_TE: Any, experts_TK: Any,
    weights_TK: Any, num_tokens: int,
) -> None:  # fmt: skip
    """Softmax over all experts, then the top-k by probability. `h_TH` is normed; `logits_TE` is
    scratch."""
    linear(h_TH, w_router, zeros, logits_TE, num_tokens)
    for t in range(num_tokens):
        logits_E, experts_K, weights_K = logits_TE[t], experts_TK[t], weights_TK[t]
        _top_k(logits_E, experts_K)
        total = softmax(logits_E, ONE, logits_E.shape[0])
        for k in range(experts_K.shape[0]):
            weights_K[k] = logits_E[experts_K[k]] / total
        _scale_weights(weights_K, normalise, ZERO, ONE)


@kernel
def route_top_k_softmax(
    h_TH: Any, w_router: Any, b_router: Any, logits_TE: Any, experts_TK: Any, weights_TK: Any,
    num_tokens: int,
) -> None:  # fmt: skip
    """The top-k logits, then a softmax over these alone. `logits_TE` is scratch."""
    linear(h_TH, w_router, b_router, logits_TE, num_tokens)
    for t in range(num_tokens):
        experts_K, weights_K = experts_TK[t], weights_TK[t]
        _top_k(logits_TE[t], experts_K)
        for k in range(experts_K.shape[0]):
            weights_K[k] = logits_TE[t, experts_K[k]]
        total = softmax(weights_K, ONE, experts_K.shape[0])
        for k in range(experts_K.shape[0]):
            weights_K[k] /= total


@kernel
def _keep_best_groups(choice_E: Any, num_groups: int, topk_group: int, by_two: bool) -> None:
    """Sets the choice of every expert outside the `topk_group` best groups to -inf. A group's value
    is the sum of its two largest scores (`by_two`), or its largest score."""
    size = choice_E.shape[0] // num_groups
    values = np.empty(num_groups, dtype=np.float32)
    for g in range(num_groups):
        first = second = -np.float32(np.inf)
        for e in range(g * size, (g + 1) * size):
            if choice_E[e] > first:
                first, second = choice_E[e], first
            elif choice_E[e] > second:
                second = choice_E[e]
        values[g] = first + second if by_two else first
    best = np.empty(topk_group, dtype=np.int32)
    _top_k(values, best)
    for g in range(num_groups):
        is_kept = False
        for k in range(topk_group):
            is_kept = is_kept or best[k] == g
        if not is_kept:
            choice_E[g * size : (g + 1) * size] = -np.float32(np.inf)


@kernel
def route_groups(
    h_TH: Any, w_router: Any, zeros: Any, correction_E: Any, sigmoid: bool, num_groups: int,
    topk_group: int, normalise: bool, factor: Any, scores_TE: Any, choice_E: Any, experts_TK: Any,
    weights_TK: Any, num_tokens: int,
) -> None:  # fmt: skip
    """DeepSeek's routing. Scores are sigmoids (or a softmax). Experts are chosen by score plus
    correction among the best groups; their weights are the scores alone. `scores_TE` and `choice_E`
    are scratch."""
    linear(h_TH, w_router, zeros, scores_TE, num_tokens)
    num_experts = scores_TE.shape[1]
    for t in range(num_tokens):
        scores_E, experts_K, weights_K = scores_TE[t], experts_TK[t], weights_TK[t]
        if sigmoid:
            for e in range(num_experts):
                scores_E[e] = ONE / (ONE + exp32(-scores_E[e]))
        else:
            total = softmax(scores_E, ONE, num_experts)
            for e in range(num_experts):
                scores_E[e] /= total
        for e in range(num_experts):
            choice_E[e] = scores_E[e] + correction_E[e]
        if topk_group < num_groups:
            _keep_best_groups(choice_E, num_groups, topk_group, sigmoid)
        _top_k(choice_E, experts_K)
        for k in range(experts_K.shape[0]):
            weights_K[k] = scores_E[experts_K[k]]
        _scale_weights(weights_K, normalise, _TINY, factor)


ENTRY_POINTS: list[EntryPoint] = [
    (
        route_softmax,
        (FLOATS_2D, FLOATS_2D, FLOATS_1D, FLAG, FLOATS_2D, INTS_2D, FLOATS_2D, INT),
    ),
    (
        route_top_k_softmax,
        (FLOATS_2D, FLOATS_2D, FLOATS_1D, FLOATS_2D, INTS_2D, FLOATS_2D, INT),
    ),
]

GROUP_ENTRY_POINTS: list[EntryPoint] = [
    (
        route_groups,
        (
            FLOATS_2D, FLOATS_2D, FLOATS_1D, FLOATS_1D, FLAG, INT, INT, FLAG, FLOAT, FLOATS_2D,
            FLOATS_1D, INTS_2D, FLOATS_2D, INT,
        ),
    ),
]  # fmt: skip
