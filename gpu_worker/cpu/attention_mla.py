"""Multi-head latent attention with its paged cache of latents, dense and sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.checkpoint.rope import Rotations
from gpu_worker.cpu.family import KvShape
from gpu_worker.cpu.kernels import linear as rows
from gpu_worker.cpu.kernels import mla as kernels
from gpu_worker.cpu.step_scratch import next_capacity, prefaulted_zeros
from gpu_worker.engine.step_batch import StepBatch

Floats = NDArray[np.float32]

INNER_EPS = np.float32(1e-6)
"""The epsilon of the norms of latents and of the indexer's keys, as in the published code."""


class MlaWeights(NamedTuple):
    """The weights of a layer's attention and of the norm before it. Matrices are `[inputs,
    outputs]`, float32. If queries have no latent, `w_qa_HQ` has no columns and `w_qb_QP` is applied
    to the hidden state."""

    norm_H: Floats
    w_qa_HQ: Floats
    b_qa_Q: Floats
    qa_norm_Q: Floats
    w_qb_QP: Floats
    w_kva_HP: Floats
    b_kva_P: Floats
    kva_norm_R: Floats
    w_uk_AFR: Floats
    w_uv_ARG: Floats
    w_o_OH: Floats
    b_o_H: Floats


class IndexerWeights(NamedTuple):
    """The weights of a layer's lightning indexer."""

    w_q_QP: Floats
    w_k_HL: Floats
    k_norm_L: Floats
    k_bias_L: Floats
    w_weights_HI: Floats


class MlaScratch:
    """Working memory that the layers of a model share."""

    def __init__(self, shape: MlaShape, block_tokens: int) -> None:
        self._shape = shape
        self._block_tokens = block_tokens
        widest = (
            shape.q_size,
            shape.rank,
            shape.v_head_dim,
            shape.num_index_heads * shape.index_head_dim,
        )
        self.zeros: Floats = np.zeros(max(*widest, shape.index_head_dim), dtype=np.float32)
        self.tile_AU: Floats = _floats(shape.num_heads, block_tokens)
        # Rows after the last chosen position get the weight zero, so they must be finite.
        self.latent_UR: Floats = prefaulted_zeros(block_tokens, shape.rank)
        self.key_UW: Floats = _floats(block_tokens, shape.qk_rope_head_dim)
        self.index_UI: Floats = _floats(block_tokens, shape.num_index_heads)
        self._allocate_context(0)
        self._allocate_tokens(0)

    def grow(self, *, num_tokens: int, context_tokens: int) -> None:
        if num_tokens > self.h_TH.shape[0]:
            self._allocate_tokens(next_capacity(num_tokens))
        if context_tokens + self._block_tokens > self.scores_CA.shape[0]:
            self._allocate_context(next_capacity(context_tokens + self._block_tokens))

    def _allocate_context(self, context: int) -> None:
        self.scores_CA: Floats = _floats(context, self._shape.num_heads)
        self.weights_AC: Floats = _floats(self._shape.num_heads, context)
        self.index_C: Floats = _floats(context)
        self.chosen_C: NDArray[np.int32] = np.empty(context, dtype=np.int32)

    def _allocate_tokens(self, num_tokens: int) -> None:
        shape, heads = self._shape, self._shape.num_heads
        self.h_TH: Floats = _floats(num_tokens, shape.hidden_size)
        self.qa_TQ: Floats = _floats(num_tokens, shape.q_lora_rank)
        self.q_TP: Floats = _floats(num_tokens, shape.q_size)
        self.kva_TP: Floats = _floats(num_tokens, shape.rank + shape.qk_rope_head_dim)
        self.plain_TF: Floats = _floats(num_tokens, shape.qk_nope_head_dim)
        self.latent_TR: Floats = _floats(num_tokens, shape.rank)
        self.q_latent_TRA: Floats = _floats(num_tokens, shape.rank, heads)
        self.q_rotated_TWA: Floats = _floats(num_tokens, shape.qk_rope_head_dim, heads)
        self.sum_TAR: Floats = _floats(num_tokens, heads, shape.rank)
        self.value_TG: Floats = _floats(num_tokens, shape.v_head_dim)
        self.heads_TO: Floats = _floats(num_tokens, shape.heads_size)
        self.index_key_TL: Floats = _floats(num_tokens, shape.index_head_dim)
        self.index_q_TP: Floats = _floats(num_tokens, shape.num_index_heads * shape.index_head_dim)
        self.q_index_TLI: Floats = _floats(num_tokens, shape.index_head_dim, shape.num_index_heads)
        self.w_index_TI: Floats = _floats(num_tokens, shape.num_index_heads)


class MlaAttention:
    """One layer: sparse if it has an indexer, else dense. Implements `family.Attention`.

    The cache holds each token's normed latent and its rotated shared key (blocks B, block_tokens U:
    `latent_BUR`, `key_BUW`), and the indexer's keys `index_key_BUL`. Stale values are always finite
    and get the weight zero.
    """

    def __init__(
        self,
        *,
        weights: MlaWeights,
        indexer: IndexerWeights | None,
        shape: MlaShape,
        kv: KvShape,
        rotations: Rotations,
        norm_eps: float,
        softmax_factor: float,
        scratch: MlaScratch,
    ) -> None:
        self._weights = weights
        self._indexer = indexer
        self._shape = shape
        self._cos_CD, self._sin_CD = rotations
        self._eps = np.float32(norm_eps)
        head_size = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        self._scale = np.float32(head_size**-0.5 * softmax_factor)
        self._scratch = scratch
        blocks = (kv.num_blocks, kv.block_tokens)
        self.latent_BUR: Floats = prefaulted_zeros(*blocks, shape.rank)
        self.key_BUW: Floats = prefaulted_zeros(*blocks, shape.qk_rope_head_dim)
        self.index_key_BUL: Floats = prefaulted_zeros(*blocks, shape.index_head_dim)

    def cache_arrays(self) -> Sequence[Floats]:
        caches = (self.latent_BUR, self.key_BUW)
        return caches if self._indexer is None else (*caches, self.index_key_BUL)

    def attend(self, x_TH: Floats, batch: StepBatch) -> None:
        scratch, weights, num_tokens = self._scratch, self._weights, batch.num_tokens
        context = int(batch.position_T.max()) + 1
        scratch.grow(num_tokens=num_tokens, context_tokens=context)
        rows.norm_rows(x_TH, weights.norm_H, self._eps, scratch.h_TH, num_tokens)
        self._project(num_tokens)
        self._store_latents(batch)
        kernels.absorb_queries(
            scratch.q_TP,
            batch.position_T,
            weights.w_uk_AFR,
            self._cos_CD,
            self._sin_CD,
            self._shape.interleaved,
            scratch.zeros,
            scratch.plain_TF,
            scratch.latent_TR,
            scratch.q_latent_TRA,
            scratch.q_rotated_TWA,
        )
        if self._indexer is None:
            self._attend_dense(batch)
        else:
            self._attend_sparse(self._indexer, batch)
        kernels.expand_sums(
            scratch.sum_TAR,
            weights.w_uv_ARG,
            scratch.zeros,
            scratch.latent_TR,
            scratch.value_TG,
            scratch.heads_TO,
            num_tokens,
        )
        kernels.project(scratch.heads_TO, weights.w_o_OH, weights.b_o_H, scratch.h_TH, num_tokens)
        rows.add_rows(x_TH, scratch.h_TH, num_tokens)

    def _project(self, num_tokens: int) -> None:
        scratch, weights = self._scratch, self._weights
        inputs = scratch.h_TH
        if self._shape.q_lora_rank:
            kernels.project(
                scratch.h_TH, weights.w_qa_HQ, weights.b_qa_Q, scratch.qa_TQ, num_tokens
            )
            rows.norm_rows(scratch.qa_TQ, weights.qa_norm_Q, INNER_EPS, scratch.qa_TQ, num_tokens)
            inputs = scratch.qa_TQ
        zeros_P = scratch.zeros[: self._shape.q_size]
        kernels.project(inputs, weights.w_qb_QP, zeros_P, scratch.q_TP, num_tokens)
        kernels.project(scratch.h_TH, weights.w_kva_HP, weights.b_kva_P, scratch.kva_TP, num_tokens)

    def _store_latents(self, batch: StepBatch) -> None:
        kernels.store_latents(
            self._scratch.kva_TP,
            batch.position_T,
            batch.sequence_T,
            batch.block_tables_SB,
            self.latent_BUR,
            self.key_BUW,
            self._weights.kva_norm_R,
            INNER_EPS,
            self._cos_CD,
            self._sin_CD,
            self._shape.interleaved,
        )

    def _attend_dense(self, batch: StepBatch) -> None:
        scratch = self._scratch
        kernels.attend_dense(
            batch.position_T,
            batch.sequence_T,
            batch.block_tables_SB,
            self.latent_BUR,
            self.key_BUW,
            scratch.q_latent_TRA,
            scratch.q_rotated_TWA,
            self._scale,
            scratch.scores_CA,
            scratch.weights_AC,
            scratch.tile_AU,
            scratch.sum_TAR,
        )

    def _attend_sparse(self, indexer: IndexerWeights, batch: StepBatch) -> None:
        self._index(indexer, batch)
        scratch = self._scratch
        kernels.attend_sparse(
            batch.position_T,
            batch.sequence_T,
            batch.block_tables_SB,
            self.latent_BUR,
            self.key_BUW,
            self.index_key_BUL,
            scratch.q_latent_TRA,
            scratch.q_rotated_TWA,
            scratch.q_index_TLI,
            scratch.w_index_TI,
            self._shape.index_top_k,
            self._scale,
            np.float32(self._shape.index_head_dim**-0.5),
            scratch.scores_CA,
            scratch.weights_AC,
            scratch.tile_AU,
            scratch.latent_UR,
            scratch.key_UW,
            scratch.index_UI,
            scratch.index_C,
            scratch.chosen_C,
            scratch.sum_TAR,
        )

    def _index(self, indexer: IndexerWeights, batch: StepBatch) -> None:
        """The indexer's keys into their cache; its queries and weights into scratch, where any row
        has to choose."""
        scratch, shape, num_tokens = self._scratch, self._shape, batch.num_tokens
        zeros = scratch.zeros
        kernels.project(
            scratch.h_TH,
            indexer.w_k_HL,
            zeros[: shape.index_head_dim],
            scratch.index_key_TL,
            num_tokens,
        )
        kernels.store_index_keys(
            scratch.index_key_TL,
            batch.position_T,
            batch.sequence_T,
            batch.block_tables_SB,
            self.index_key_BUL,
            indexer.k_norm_L,
            indexer.k_bias_L,
            INNER_EPS,
            self._cos_CD,
            self._sin_CD,
        )
        if int(batch.position_T.max()) < shape.index_top_k:
            return
        zeros_P = zeros[: indexer.w_q_QP.shape[1]]
        kernels.project(scratch.qa_TQ, indexer.w_q_QP, zeros_P, scratch.index_q_TP, num_tokens)
        kernels.rotate_index_queries(
            scratch.index_q_TP,
            batch.position_T,
            self._cos_CD,
            self._sin_CD,
            scratch.q_index_TLI,
        )
        zeros_I = zeros[: shape.num_index_heads]
        kernels.project(scratch.h_TH, indexer.w_weights_HI, zeros_I, scratch.w_index_TI, num_tokens)
        factor = np.float32(shape.num_index_heads**-0.5)
        kernels.scale_rows(scratch.w_index_TI, factor, num_tokens)


def _floats(*shape: int) -> Floats:
    return np.empty(shape, dtype=np.float32)
