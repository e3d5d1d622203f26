"""Gated MLPs: reading them into the layout of the kernels, and computing many of them at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_worker.model.checkpoint import Checkpoint
from gpu_worker.model.expert_slots import ExpertWeights, MlpWeights
from gpu_worker.model.kernels import experts as kernels
from gpu_worker.model.mlp_names import USUAL_NAMES, MlpNames
from gpu_worker.model.step_scratch import room_for
from gpu_worker.model.weights import into_panels, read_weight

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


DenseWeights = MlpWeights
"""One MLP that every token goes through: S is 1."""


class MlpRunner:
    """Computes (row, MLP) pairs; keeps the scratch memory, which only ever grows."""

    def __init__(
        self, *, hidden_size: int, inner_size: int, num_mlps: int, activation: int
    ) -> None:
        self._hidden_size = hidden_size
        self._inner_size = inner_size
        self._activation = activation
        self._ends_S: Ints = np.empty(num_mlps, dtype=np.int32)
        self._allocate(0)

    def run(self, x_MH: Floats, rows_N: Ints, mlps_N: Ints, weights: MlpWeights) -> Floats:
        """`y_NH`: for each pair the output of MLP `mlps_N` for row `rows_N` of x. Valid until the
        next call."""
        num_pairs = rows_N.shape[0]
        if num_pairs > self._y_NH.shape[0]:
            self._allocate(room_for(num_pairs))
        if num_pairs:
            kernels.run_experts(
                x_MH,
                rows_N,
                mlps_N,
                *weights,
                self._activation,
                self._y_NH,
                self._order_N,
                self._ends_S,
                self._x_NH,
                self._gate_up_NJ,
                self._inner_NI,
                self._out_NH,
            )
        return self._y_NH[:num_pairs]

    def _allocate(self, num_pairs: int) -> None:
        def floats(width: int) -> Floats:
            return np.empty((num_pairs, width), dtype=np.float32)

        self._x_NH = floats(self._hidden_size)
        self._gate_up_NJ = floats(2 * self._inner_size)
        self._inner_NI = floats(self._inner_size)
        self._out_NH = floats(self._hidden_size)
        self._y_NH = floats(self._hidden_size)
        self._order_N: Ints = np.empty(num_pairs, dtype=np.int32)


def read_mlp(checkpoint: Checkpoint, prefix: str, names: MlpNames = USUAL_NAMES) -> ExpertWeights:
    return ExpertWeights(
        gate_IH=read_weight(checkpoint, f"{prefix}.{names.gate}.weight"),
        up_IH=read_weight(checkpoint, f"{prefix}.{names.up}.weight"),
        down_HI=read_weight(checkpoint, f"{prefix}.{names.down}.weight"),
    )


def read_dense(checkpoint: Checkpoint, prefix: str) -> DenseWeights:
    mlp = read_mlp(checkpoint, prefix)
    inner_size, hidden_size = mlp.gate_IH.shape
    return DenseWeights(
        w_gate_up=into_panels(np.concatenate([mlp.gate_IH, mlp.up_IH]).T)[None],
        w_down=into_panels(mlp.down_HI.T)[None],
        b_gate_up_SJ=np.zeros((1, 2 * inner_size), dtype=np.float32),
        b_down_SH=np.zeros((1, hidden_size), dtype=np.float32),
    )
