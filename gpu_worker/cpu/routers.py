"""The routers of all families. Each implements `family.Router`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_worker.cpu.kernels import router as kernels
from gpu_worker.cpu.step_scratch import next_capacity

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


class _Scratch:
    """Memory for the scores of a step's tokens. It only grows."""

    def __init__(self, num_experts: int) -> None:
        self._scores_TE: Floats = np.empty((0, num_experts), dtype=np.float32)

    def scores(self, num_tokens: int) -> Floats:
        if num_tokens > self._scores_TE.shape[0]:
            shape = (next_capacity(num_tokens), self._scores_TE.shape[1])
            self._scores_TE = np.empty(shape, dtype=np.float32)
        return self._scores_TE


class SoftmaxRouter:
    """Softmax over all experts, then the top-k; `normalise` makes their weights sum to one."""

    def __init__(self, w_router_HE: Floats, *, normalise: bool) -> None:
        self._w_router_HE = w_router_HE
        self._normalise = normalise
        self._zeros_E: Floats = np.zeros(w_router_HE.shape[1], dtype=np.float32)
        self._scratch = _Scratch(w_router_HE.shape[1])

    def route(self, h_TH: Floats, experts_TK: Ints, weights_TK: Floats, num_tokens: int) -> None:
        kernels.route_softmax(
            h_TH,
            self._w_router_HE,
            self._zeros_E,
            self._normalise,
            self._scratch.scores(num_tokens),
            experts_TK,
            weights_TK,
            num_tokens,
        )


class TopKSoftmaxRouter:
    """The top-k logits of a linear layer with a bias, then a softmax over these alone."""

    def __init__(self, w_router_HE: Floats, b_router_E: Floats) -> None:
        self._w_router_HE = w_router_HE
        self._b_router_E = b_router_E
        self._scratch = _Scratch(w_router_HE.shape[1])

    def route(self, h_TH: Floats, experts_TK: Ints, weights_TK: Floats, num_tokens: int) -> None:
        kernels.route_top_k_softmax(
            h_TH,
            self._w_router_HE,
            self._b_router_E,
            self._scratch.scores(num_tokens),
            experts_TK,
            weights_TK,
            num_tokens,
        )


class GroupRouter:
    """DeepSeek's router. The correction is added to scores for the choice, not for the weight.
    Experts come from the `topk_group` best of `num_groups` groups, and weights are scaled by
    `factor`. V3: scores are sigmoids, and a group's value is the sum of its two best. V2: scores
    are a softmax, and a group's value is its best."""

    def __init__(
        self,
        w_router_HE: Floats,
        correction_E: Floats,
        *,
        sigmoid: bool,
        num_groups: int,
        topk_group: int,
        normalise: bool,
        factor: float,
    ) -> None:
        num_experts = w_router_HE.shape[1]
        self._w_router_HE = w_router_HE
        self._correction_E = correction_E
        self._options = (sigmoid, num_groups, topk_group, normalise, np.float32(factor))
        self._zeros_E: Floats = np.zeros(num_experts, dtype=np.float32)
        self._choice_E: Floats = np.empty(num_experts, dtype=np.float32)
        self._scratch = _Scratch(num_experts)

    def route(self, h_TH: Floats, experts_TK: Ints, weights_TK: Floats, num_tokens: int) -> None:
        kernels.route_groups(
            h_TH,
            self._w_router_HE,
            self._zeros_E,
            self._correction_E,
            *self._options,
            self._scratch.scores(num_tokens),
            self._choice_E,
            experts_TK,
            weights_TK,
            num_tokens,
        )
