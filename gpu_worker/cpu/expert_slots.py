"""The physical expert slots of one rank: preallocated weights, the expert that each slot holds, and
loading of some slots while the engine uses others. The planner decides which expert goes where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.slot_ledger import SlotLedger
from gpu_worker.cpu.kernels.tiles import pack
from gpu_worker.cpu.kernels.warm_up import WEIGHT_DTYPES
from gpu_worker.cpu.weights import Weights, empty_panels
from shared.types import EMPTY_SLOT


class MlpSlot(NamedTuple):
    """The destination of one MLP's weights. They are put matrix by matrix, so that no more than one
    matrix is in memory beside the slot. The arguments have the shapes of checkpoints: `gate_IH`,
    `up_IH`, `down_HI`."""

    w_gate_up: Weights
    w_down: Weights
    b_gate_up_J: NDArray[np.float32]
    b_down_H: NDArray[np.float32]

    def put_gate(self, gate_IH: Weights) -> None:
        self._put(gate_IH, self.w_gate_up, 0)

    def put_up(self, up_IH: Weights) -> None:
        self._put(up_IH, self.w_gate_up, up_IH.shape[0])

    def put_down(self, down_HI: Weights) -> None:
        self._put(down_HI, self.w_down, 0)

    def _put(self, w_NK: Weights, panels: Weights, first: int) -> None:
        assert w_NK.dtype == panels.dtype
        pack(w_NK.T, panels, first)


class MlpWeights(NamedTuple):
    """The weights of S MLPs, in panels of `[H, J]` and `[I, H]`: hidden H, inner I, J = 2I (gate,
    then up)."""

    w_gate_up: Weights
    w_down: Weights
    b_gate_up_SJ: NDArray[np.float32]
    b_down_SH: NDArray[np.float32]

    def slot(self, index: int) -> MlpSlot:
        return MlpSlot(*(array[index] for array in self))


class ExpertSlots:
    """Layers L (MoE layers only), slots S, hidden H, inner I.

    One thread loads while another computes: `load` touches only the slot's own memory, and no map
    names a slot before its contents are published. `read_expert(layer, expert, slot)` puts the
    weights.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        slots_per_rank: int,
        hidden_size: int,
        inner_size: int,
        read_expert: Callable[[int, int, MlpSlot], None],
        dtype: np.dtype[Any] = WEIGHT_DTYPES[0],
    ) -> None:
        """`dtype` is that of the weights that `read_expert` puts."""
        leading = (num_layers, slots_per_rank)
        self.w_gate_up = empty_panels(leading, hidden_size, 2 * inner_size, dtype)
        self.w_down = empty_panels(leading, inner_size, hidden_size, dtype)
        self.b_gate_up_LSJ = np.zeros((*leading, 2 * inner_size), dtype=np.float32)
        self.b_down_LSH = np.zeros((*leading, hidden_size), dtype=np.float32)
        self._ledger = SlotLedger(num_layers, slots_per_rank)
        self._read_expert = read_expert

    @property
    def contents(self) -> NDArray[np.int16]:
        """A copy, `[L, S]`: the expert that each slot holds completely, or EMPTY_SLOT."""
        return self._ledger.contents

    def weights(self, layer: int) -> MlpWeights:
        """The weights of all slots of a layer."""
        return MlpWeights(
            w_gate_up=self.w_gate_up[layer],
            w_down=self.w_down[layer],
            b_gate_up_SJ=self.b_gate_up_LSJ[layer],
            b_down_SH=self.b_down_LSH[layer],
        )

    def load(self, layer: int, slot: int, expert: int) -> None:
        """The slot counts as empty until the expert is loaded completely."""
        self._ledger.set(layer, slot, EMPTY_SLOT)
        self._read_expert(layer, expert, self.weights(layer).slot(slot))
        self._ledger.set(layer, slot, expert)

    def load_all(
        self,
        desired_LS: NDArray[np.int16],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Makes `contents` equal to `desired_LS`: loads the slots that differ, and marks a slot
        empty if EMPTY_SLOT is desired. Calls `on_progress(loaded, to_load)` after each load."""
        present_LS = self.contents
        assert desired_LS.shape == present_LS.shape, "the assignment is for other slots"
        differs_LS = desired_LS != present_LS
        for layer, slot in np.argwhere(differs_LS & (desired_LS < 0)):
            self._ledger.set(int(layer), int(slot), EMPTY_SLOT)
        to_load = np.argwhere(differs_LS & (desired_LS >= 0))
        for done, (layer, slot) in enumerate(to_load):
            self.load(int(layer), int(slot), int(desired_LS[layer, slot]))
            if on_progress is not None:
                on_progress(done + 1, len(to_load))
