"""Experts that no slot has room for, computed all the same: their weights are read from the
checkpoint when tokens ask for them, one expert at a time. Slow, and exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_worker.cpu.expert_slots import MlpSlot, MlpWeights
from gpu_worker.cpu.mlp import MlpRunner
from gpu_worker.cpu.weights import empty_panels
from shared.expert_map import Placement

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


class OnDemandExperts:
    """Of one rank. In a map, on-demand experts follow the slots: expert p of a layer's row has the
    number `first_slot + p`. Holds memory for one expert, once it is needed."""

    def __init__(
        self,
        *,
        first_slot: int,
        hidden_size: int,
        inner_size: int,
        dtype: np.dtype[Any],
        activation: int,
        read_expert: Callable[[int, int, MlpSlot], None],
    ) -> None:
        self._first_slot = first_slot
        self._sizes = (hidden_size, inner_size)
        self._dtype = dtype
        self._runner = MlpRunner(
            hidden_size=hidden_size, inner_size=inner_size, num_mlps=1, activation=activation
        )
        self._read_expert = read_expert
        self._row_LP: Placement = np.empty((0, 0), dtype=np.int16)
        self._weights: MlpWeights | None = None
        self._held: tuple[int, int] | None = None  # the layer and expert in that memory

    def use(self, row_LP: Placement) -> None:
        """What this rank computes on demand from the next step on, as in `ExpertMap.on_demand`."""
        self._row_LP = row_LP

    @property
    def is_used(self) -> bool:
        return self._row_LP.size > 0

    def run(
        self,
        layer: int,
        x_MH: Floats,
        rows_N: Ints,
        slots_N: Ints,
        run_slots: Callable[..., Floats],
    ) -> Floats:
        """As `MlpRunner.run`. `run_slots(rows, slots)` computes the pairs whose experts are in
        slots. Raises CheckpointError."""
        y_NH = np.empty((rows_N.shape[0], x_MH.shape[1]), dtype=np.float32)
        is_here_N = slots_N < self._first_slot
        if is_here_N.any():
            y_NH[is_here_N] = run_slots(rows_N[is_here_N], slots_N[is_here_N])
        for slot in np.unique(slots_N[~is_here_N]).tolist():
            pairs = np.flatnonzero(slots_N == slot)
            expert = int(self._row_LP[layer, slot - self._first_slot])
            weights = self._loaded(layer, expert)
            zeros = np.zeros(pairs.size, dtype=np.int32)
            y_NH[pairs] = self._runner.run(x_MH, rows_N[pairs], zeros, weights)
        return y_NH

    def _loaded(self, layer: int, expert: int) -> MlpWeights:
        if self._weights is None:
            self._weights = self._new_weights()
        if self._held != (layer, expert):
            self._held = None  # until it is read completely
            self._read_expert(layer, expert, self._weights.slot(0))
            self._held = (layer, expert)
        return self._weights

    def _new_weights(self) -> MlpWeights:
        hidden, inner = self._sizes
        return MlpWeights(
            w_gate_up=empty_panels((1,), hidden, 2 * inner, self._dtype),
            w_down=empty_panels((1,), inner, hidden, self._dtype),
            b_gate_up_SJ=np.zeros((1, 2 * inner), dtype=np.float32),
            b_down_SH=np.zeros((1, hidden), dtype=np.float32),
        )
