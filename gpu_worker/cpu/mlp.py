"""Gated MLPs: reads them into the layout of the kernels, and computes many of them at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.checkpoint.mlp_names import USUAL_NAMES, MlpNames
from gpu_worker.cpu.expert_slots import MlpSlot, MlpWeights
from gpu_worker.cpu.kernels import experts as kernels
from gpu_worker.cpu.step_scratch import next_capacity
from gpu_worker.cpu.weights import empty_panels, read_weight, weights_dtype

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


DenseWeights = MlpWeights
"""One MLP that every token goes through, so S is 1."""


class MlpRunner:
    """Computes (row, MLP) pairs. Owns the scratch memory, which only grows."""

    def __init__(
        self, *, hidden_size: int, inner_size: int, num_mlps: int, activation: int
    ) -> None:
        self._hidden_size = hidden_size
        self._inner_size = inner_size
        self._activation = activation
        self._ends_S: Ints = np.empty(num_mlps, dtype=np.int32)
        self._allocate(0)

    def run(self, x_MH: Floats, rows_N: Ints, mlps_N: Ints, weights: MlpWeights) -> Floats:
        """`y_NH`, float32: for each pair the output of MLP `mlps_N` for row `rows_N` of x. Valid
        until the next call."""
        num_pairs = rows_N.shape[0]
        if num_pairs > self._y_NH.shape[0]:
            self._allocate(next_capacity(num_pairs))
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


def read_mlp(
    checkpoint: Checkpoint, prefix: str, slot: MlpSlot, names: MlpNames = USUAL_NAMES
) -> None:
    slot.put_gate(read_weight(checkpoint, f"{prefix}.{names.gate}.weight"))
    slot.put_up(read_weight(checkpoint, f"{prefix}.{names.up}.weight"))
    slot.put_down(read_weight(checkpoint, f"{prefix}.{names.down}.weight"))


def read_dense(checkpoint: Checkpoint, prefix: str) -> DenseWeights:
    inner_size, hidden_size = checkpoint.shape(f"{prefix}.{USUAL_NAMES.gate}.weight")
    dtype = weights_dtype(checkpoint)
    weights = DenseWeights(
        w_gate_up=empty_panels((1,), hidden_size, 2 * inner_size, dtype),
        w_down=empty_panels((1,), inner_size, hidden_size, dtype),
        b_gate_up_SJ=np.zeros((1, 2 * inner_size), dtype=np.float32),
        b_down_SH=np.zeros((1, hidden_size), dtype=np.float32),
    )
    read_mlp(checkpoint, prefix, weights.slot(0))
    return weights
