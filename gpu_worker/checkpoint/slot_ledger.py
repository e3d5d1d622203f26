"""Which expert each slot of a rank holds, for slots in any kind of memory."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from shared.types import EMPTY_SLOT


class SlotLedger:
    """Layers L (MoE layers only), slots S. One thread writes, others read."""

    def __init__(self, num_layers: int, slots_per_rank: int) -> None:
        self._contents: NDArray[np.int16] = np.full(
            (num_layers, slots_per_rank), EMPTY_SLOT, dtype=np.int16
        )
        self._lock = threading.Lock()

    @property
    def contents(self) -> NDArray[np.int16]:
        """A copy, int16 `[L, S]`: the expert that each slot holds completely, or EMPTY_SLOT."""
        with self._lock:
            return self._contents.copy()

    def set(self, layer: int, slot: int, expert: int) -> None:
        with self._lock:
            self._contents[layer, slot] = expert
