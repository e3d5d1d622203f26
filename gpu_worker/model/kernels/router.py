"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

from typing import Any

from gpu_worker.model.kernels.arithmetic import ONE, ZERO, kernel
from gpu_worker.model.kernels.linear import linear, softmax
from gpu_worker.model.kernels.warm_up import (
    FLAG,
    FLOATS_1D,
    FLOATS_2D,
    INT,
    INTS_2D,
    EntryPoint,
)


@kernel
def _choose_experts(logits_E: Any, experts_K: Any, weights_K: Any, normalise: bool) -> None:
    """Top-k by logit, the lower expert first among equals; weights are softmax probabilities."""
    num_experts = logits_E.shape[0]
    for k in range(experts_K.shape[0]):
        best = -1
        for e in range(num_experts):
            taken = False
            for j in range(k):
                taken = taken or experts_K[j] == e
            if not taken and (best < 0 or logits_E[e] > logits_E[best]):
                best = e
        experts_K[k] = best
    total = softmax(logits_E, ONE, num_experts)
    for k in range(experts_K.shape[0]):
        weights_K[k] = logits_E[experts_K[k]] / total
    if normalise:
        total = ZERO
        for k in range(experts_K.shape[0]):
            total += weights_K[k]
        for k in range(experts_K.shape[0]):
            weights_K[k] /= total


@kernel
def route_softmax(
    h_TH: Any, w_router: Any, zeros: Any, normalise: bool, logits_TE: Any, experts_TK: Any,
    weights_TK: Any, num_tokens: int,
) -> None:  # fmt: skip
    """The experts of normed tokens and their weights. `logits_TE` is scratch."""
    linear(h_TH, w_router, zeros[: w_router.shape[1]], logits_TE, num_tokens)
    for t in range(num_tokens):
        _choose_experts(logits_TE[t], experts_TK[t], weights_TK[t], normalise)


ENTRY_POINTS: list[EntryPoint] = [
    (
        route_softmax,
        (FLOATS_2D, FLOATS_2D, FLOATS_1D, FLAG, FLOATS_2D, INTS_2D, FLOATS_2D, INT),
    ),
]
