"""Working memory of a forward, kept between steps and only ever grown, so that a step allocates
nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class TokenScratch:
    """For the rank's own tokens of a step. Rows beyond the step's tokens are garbage."""

    def __init__(
        self,
        *,
        hidden_size: int,
        qkv_size: int,
        heads_size: int,
        heads_per_kv_head: int,
        num_experts: int,
        top_k: int,
    ) -> None:
        self._widths = (hidden_size, qkv_size, heads_size, num_experts, top_k)
        self._heads_per_kv_head = heads_per_kv_head
        self.scores_GC: Floats = np.empty((heads_per_kv_head, 0), dtype=np.float32)
        self._allocate(0)

    def grow(self, *, num_tokens: int, context_tokens: int) -> None:
        """`context_tokens` in whole blocks."""
        if num_tokens > self.x_TH.shape[0]:
            self._allocate(_room_for(num_tokens))
        if context_tokens > self.scores_GC.shape[1]:
            shape = (self._heads_per_kv_head, _room_for(context_tokens))
            self.scores_GC = np.empty(shape, dtype=np.float32)

    def _allocate(self, num_tokens: int) -> None:
        hidden_size, qkv_size, heads_size, num_experts, top_k = self._widths
        self.x_TH: Floats = np.empty((num_tokens, hidden_size), dtype=np.float32)
        self.h_TH: Floats = np.empty((num_tokens, hidden_size), dtype=np.float32)
        self.qkv_TP: Floats = np.empty((num_tokens, qkv_size), dtype=np.float32)
        self.heads_TO: Floats = np.empty((num_tokens, heads_size), dtype=np.float32)
        self.router_TE: Floats = np.empty((num_tokens, num_experts), dtype=np.float32)
        self.weights_TK: Floats = np.empty((num_tokens, top_k), dtype=np.float32)
        self.experts_TK: NDArray[np.int32] = np.empty((num_tokens, top_k), dtype=np.int32)
        self.rows_T: NDArray[np.int32] = np.arange(num_tokens, dtype=np.int32)
        self.zeros_T: NDArray[np.int32] = np.zeros(num_tokens, dtype=np.int32)


class PairScratch:
    """For the (row, slot) pairs that the rank's experts compute in one layer."""

    def __init__(self, *, hidden_size: int, inner_size: int, num_slots: int) -> None:
        self._hidden_size = hidden_size
        self._inner_size = inner_size
        self.ends_S: NDArray[np.int32] = np.empty(num_slots, dtype=np.int32)
        self._allocate(0)

    def grow(self, num_pairs: int) -> None:
        if num_pairs > self.y_NH.shape[0]:
            self._allocate(_room_for(num_pairs))

    def _allocate(self, num_pairs: int) -> None:
        self.x_NH: Floats = np.empty((num_pairs, self._hidden_size), dtype=np.float32)
        self.gate_up_NJ: Floats = np.empty((num_pairs, 2 * self._inner_size), dtype=np.float32)
        self.inner_NI: Floats = np.empty((num_pairs, self._inner_size), dtype=np.float32)
        self.out_NH: Floats = np.empty((num_pairs, self._hidden_size), dtype=np.float32)
        self.y_NH: Floats = np.empty((num_pairs, self._hidden_size), dtype=np.float32)
        self.order_N: NDArray[np.int32] = np.empty(num_pairs, dtype=np.int32)


def _room_for(count: int) -> int:
    """The next power of two: few reallocations while a load builds up."""
    return 1 << (count - 1).bit_length()
