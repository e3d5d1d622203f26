"""The ways in which families choose experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_worker.model.kernels import router as kernels
from gpu_worker.model.step_scratch import room_for

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


class SoftmaxRouter:
    """Softmax over all experts, then the top-k; `normalise` makes their weights sum to one.
    Implements `family.Router`."""

    def __init__(self, w_router_HE: Floats, *, normalise: bool) -> None:
        self._w_router_HE = w_router_HE
        self._normalise = normalise
        self._zeros_E: Floats = np.zeros(w_router_HE.shape[1], dtype=np.float32)
        self._logits_TE: Floats = np.empty((0, w_router_HE.shape[1]), dtype=np.float32)

    def route(self, h_TH: Floats, experts_TK: Ints, weights_TK: Floats, num_tokens: int) -> None:
        if num_tokens > self._logits_TE.shape[0]:
            shape = (room_for(num_tokens), self._logits_TE.shape[1])
            self._logits_TE = np.empty(shape, dtype=np.float32)
        kernels.route_softmax(
            h_TH,
            self._w_router_HE,
            self._zeros_E,
            self._normalise,
            self._logits_TE,
            experts_TK,
            weights_TK,
            num_tokens,
        )
