"""Attention with grouped query heads over a paged KV cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_worker.model.family import KvShape
from gpu_worker.model.kernels import gqa as kernels
from gpu_worker.model.step_scratch import room_for
from gpu_worker.step_batch import StepBatch

Floats = NDArray[np.float32]


class GqaWeights(NamedTuple):
    """A layer's, with the norm before it; matrices are `[inputs, outputs]`."""

    norm_H: Floats
    w_qkv_HP: Floats
    b_qkv_P: Floats
    q_norm_D: Floats
    k_norm_D: Floats
    w_o_OH: Floats
    b_o_H: Floats


class GqaScratch:
    """Working memory that the layers of a model share."""

    def __init__(self, *, hidden_size: int, num_heads: int, kv_heads: int, head_dim: int) -> None:
        self._group = num_heads // kv_heads
        self._widths = (hidden_size, (num_heads + 2 * kv_heads) * head_dim, num_heads * head_dim)
        self.scores_GC: Floats = np.empty((self._group, 0), dtype=np.float32)
        self._allocate(0)

    def grow(self, *, num_tokens: int, context_tokens: int) -> None:
        """`context_tokens` in whole blocks."""
        if num_tokens > self.h_TH.shape[0]:
            self._allocate(room_for(num_tokens))
        if context_tokens > self.scores_GC.shape[1]:
            self.scores_GC = np.empty((self._group, room_for(context_tokens)), dtype=np.float32)

    def _allocate(self, num_tokens: int) -> None:
        self.h_TH, self.qkv_TP, self.heads_TO = (
            np.empty((num_tokens, width), dtype=np.float32) for width in self._widths
        )


class GqaAttention:
    """One layer. Implements `family.Attention`.

    Keys lie transposed inside a block (blocks B, KV heads J, head size D, block_tokens U:
    `k_BJDU`, `v_BJUD`), so that scores of a block's tokens are computed side by side. The cache
    starts as zeros, written now: the first touch of fresh memory costs milliseconds a page on a
    virtual machine, and must not fall into a step. Stale values stay finite for ever, and are
    masked by position.
    """

    def __init__(
        self,
        *,
        weights: GqaWeights,
        kv: KvShape,
        kv_heads: int,
        head_dim: int,
        rotations: tuple[Floats, Floats],
        norm_eps: float,
        scratch: GqaScratch,
    ) -> None:
        self._weights = weights
        self._cos_CD, self._sin_CD = rotations
        self._eps = np.float32(norm_eps)
        self._scale = np.float32(head_dim**-0.5)
        self._scratch = scratch
        self.k_BJDU: Floats = np.zeros(
            (kv.num_blocks, kv_heads, head_dim, kv.block_tokens), dtype=np.float32
        )
        self.v_BJUD: Floats = np.zeros(
            (kv.num_blocks, kv_heads, kv.block_tokens, head_dim), dtype=np.float32
        )
        self.k_BJDU.fill(0.0)
        self.v_BJUD.fill(0.0)

    def cache_arrays(self) -> Sequence[Floats]:
        return (self.k_BJDU, self.v_BJUD)

    def attend(self, x_TH: Floats, batch: StepBatch) -> None:
        scratch = self._scratch
        context = int(batch.position_T.max()) + 1
        block_tokens = self.k_BJDU.shape[3]
        scratch.grow(num_tokens=batch.num_tokens, context_tokens=context + block_tokens)
        kernels.attend(
            x_TH,
            batch.position_T,
            batch.sequence_T,
            batch.block_tables_SB,
            self.k_BJDU,
            self.v_BJUD,
            *self._weights,
            self._cos_CD,
            self._sin_CD,
            self._eps,
            self._scale,
            scratch.h_TH,
            scratch.qkv_TP,
            scratch.heads_TO,
            scratch.scores_GC,
        )
