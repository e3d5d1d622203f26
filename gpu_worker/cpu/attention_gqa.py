"""Attention with grouped query heads over a paged KV cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.checkpoint.gqa_shape import GqaShape
from gpu_worker.cpu.family import KvShape
from gpu_worker.cpu.kernels import gqa as kernels
from gpu_worker.cpu.step_scratch import next_capacity, prefaulted_zeros
from gpu_worker.cpu.weights import Weights, read_panels, read_vector
from gpu_worker.engine.step_batch import StepBatch

Floats = NDArray[np.float32]


class GqaWeights(NamedTuple):
    """The weights of a layer's attention and of the norm before it. Matrices are in panels. The
    norms of queries and keys may be empty. The sinks, one for each query head, may be empty too."""

    norm_H: Floats
    w_qkv: Weights
    b_qkv_P: Floats
    q_norm: Floats
    k_norm: Floats
    w_o: Weights
    b_o_H: Floats
    sinks_A: Floats


_TILE_ROWS = 12
"""Query rows in a tile: rows that share a sequence and a KV head are computed together."""


class GqaScratch:
    """Working memory that the layers of a model share."""

    def __init__(self, *, hidden_size: int, shape: GqaShape) -> None:
        group = shape.num_heads // shape.num_kv_heads
        self._rows = group * max(1, _TILE_ROWS // group)
        self._widths = (hidden_size, shape.q_size + 2 * shape.kv_size, shape.q_size)
        self.scores_RC: Floats = np.zeros((self._rows, 0), dtype=np.float32)
        self._allocate(0)

    def grow(self, *, num_tokens: int, context_tokens: int) -> None:
        """`context_tokens` is rounded up to whole blocks."""
        if num_tokens > self.h_TH.shape[0]:
            self._allocate(next_capacity(num_tokens))
        if context_tokens > self.scores_RC.shape[1]:
            self.scores_RC = np.empty((self._rows, next_capacity(context_tokens)), dtype=np.float32)

    def _allocate(self, num_tokens: int) -> None:
        self.h_TH, self.qkv_TP, self.heads_TO = (
            np.empty((num_tokens, width), dtype=np.float32) for width in self._widths
        )


class GqaAttention:
    """One layer. Implements `family.Attention`.

    Keys are transposed inside a block (blocks B, KV heads J, head size D, block_tokens U: `k_BJDU`,
    `v_BJUD`), so that the scores of a block's tokens are computed side by side. Stale values are
    always finite, and are masked by position.
    """

    def __init__(
        self,
        *,
        weights: GqaWeights,
        kv: KvShape,
        shape: GqaShape,
        rotations: tuple[Floats, Floats],
        norm_eps: float,
        scratch: GqaScratch,
    ) -> None:
        self._weights = weights
        self._cos_CD, self._sin_CD = rotations
        self._eps = np.float32(norm_eps)
        self._scale = np.float32(shape.head_dim**-0.5)
        self._shape = shape
        self._clip = np.float32(shape.clip)
        self._scratch = scratch
        blocks = (kv.num_blocks, shape.num_kv_heads)
        self.k_BJDU = prefaulted_zeros(*blocks, shape.head_dim, kv.block_tokens)
        self.v_BJUD = prefaulted_zeros(*blocks, kv.block_tokens, shape.head_dim)

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
            self._shape.qk_norm,
            self._clip,
            self._shape.window,
            scratch.h_TH,
            scratch.qkv_TP,
            scratch.heads_TO,
            scratch.scores_RC,
        )


EMPTY: Floats = np.zeros(0, dtype=np.float32)


def read_gqa(checkpoint: Checkpoint, prefix: str, norm_name: str) -> GqaWeights:
    """Reads the tensors that `gqa_shapes` names. Biases are zeros, and norms and sinks are empty,
    if the checkpoint was opened without them."""

    def vector(name: str) -> Floats:
        return read_vector(checkpoint, name) if checkpoint.has(name) else EMPTY

    def bias(names: str, size: int) -> Floats:
        parts = [vector(f"{prefix}.{n}_proj.bias") for n in names]
        return np.concatenate(parts) if parts[0].size else np.zeros(size, dtype=np.float32)

    matrices = [f"{prefix}.{n}_proj.weight" for n in "qkv"]
    qkv_size = sum(checkpoint.shape(name)[0] for name in matrices)
    hidden_size = checkpoint.shape(f"{prefix}.o_proj.weight")[0]
    return GqaWeights(
        norm_H=read_vector(checkpoint, norm_name),
        w_qkv=read_panels(checkpoint, *matrices),
        b_qkv_P=bias("qkv", qkv_size),
        q_norm=vector(f"{prefix}.q_norm.weight"),
        k_norm=vector(f"{prefix}.k_norm.weight"),
        w_o=read_panels(checkpoint, f"{prefix}.o_proj.weight"),
        b_o_H=bias("o", hidden_size),
        sinks_A=vector(f"{prefix}.sinks"),
    )
