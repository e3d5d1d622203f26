"""Latent attention of a step, with its paged cache of latents. Keys and values are never expanded:
queries go into the latent space, and sums of latents come out of it. If a context may be longer
than what the model's indexer selects, rows see only the selected positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.checkpoint.rope import Rope
from gpu_worker.cuda.kernels import latent
from gpu_worker.cuda.kernels.paging import Paging
from gpu_worker.cuda.kernels.splits import new_partials
from gpu_worker.cuda.stages.gemm import Gemm, StepAllocator
from gpu_worker.cuda.stages.indexer_stage import INNER_EPS, IndexerStage
from gpu_worker.cuda.weights.decoder_weights import MlaWeights

_ROWS_AT_ONCE = 128
"""Bounds the memory for the splits' results; changes no bit."""


class MlaStage:
    """Implements `attention_stage.AttentionStage`. Shape letters as in `kernels.latent`."""

    def __init__(
        self,
        shape: MlaShape,
        weights: Sequence[MlaWeights],
        rope: Rope,
        allocator: StepAllocator,
        *,
        kv_blocks: int,
        block_tokens: int,
        context_tokens_max: int,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`kv_dtype` is the latents', see `kernels.cached_values`. Raises ValueError for sizes that
        have no kernels."""
        _check(shape)
        self._weights = weights
        blocks = (len(weights), kv_blocks, block_tokens)
        self.latent_LBUR = allocator.zeros(*blocks, shape.rank, of=kv_dtype)
        self.key_LBUW = allocator.zeros(*blocks, shape.qk_rope_head_dim)
        cos_CD, sin_CD = rope.rotations(shape.qk_rope_head_dim, context_tokens_max)
        self._rotation = latent.Rotation(
            torch.from_numpy(cos_CD).to(allocator.device),
            torch.from_numpy(sin_CD).to(allocator.device),
            shape.interleaved,
        )
        head_size = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        self._scale = head_size**-0.5 * rope.softmax_factor
        seen_max = context_tokens_max
        self._indexer: IndexerStage | None = None
        if shape.num_index_heads and context_tokens_max > shape.index_top_k:
            seen_max = shape.index_top_k
            self._indexer = IndexerStage(
                shape,
                [own.indexer for own in weights if own.indexer is not None],
                self._rotation,
                allocator,
                kv_blocks=kv_blocks,
                block_tokens=block_tokens,
                context_tokens_max=context_tokens_max,
            )
        self._nope_columns = latent.HeadColumns(0, head_size)
        self._rope_columns = latent.HeadColumns(shape.qk_nope_head_dim, head_size)
        self._sum_columns = latent.HeadColumns(0, shape.rank)
        tokens, heads = allocator.tokens_max, shape.num_heads
        columns = weights[0].w_in_CH.shape[0]
        self._in = Gemm(allocator, inner=shape.hidden_size, columns=columns)
        self._q = (
            Gemm(allocator, inner=shape.q_lora_rank, columns=shape.q_size)
            if shape.q_lora_rank
            else None
        )
        self._q_TM = allocator.zeros(tokens, shape.q_lora_rank) if shape.q_lora_rank else None
        self._q_latent_TAR = allocator.zeros(tokens, heads, shape.rank)
        self._q_rotated_TAW = allocator.zeros(tokens, heads, shape.qk_rope_head_dim)
        self._sum_TAR = allocator.zeros(tokens, heads, shape.rank)
        self._heads_TO = allocator.zeros(tokens, shape.heads_size)
        self._partials = new_partials(
            min(tokens, _ROWS_AT_ONCE),
            heads,
            latent.num_splits(seen_max),
            shape.rank,
            allocator.device,
        )

    def cache(self) -> tuple[Tensor, ...]:
        latents = (self.latent_LBUR, self.key_LBUW)
        return latents if self._indexer is None else (*latents, self._indexer.key_LBUZ)

    def run(self, layer: int, h_TH: Tensor, paging: Paging) -> Tensor:
        weights, tokens = self._weights[layer], h_TH.shape[0]
        cache = latent.LatentCache(self.latent_LBUR[layer], self.key_LBUW[layer])
        q_PTN = self._project(weights, h_TH, paging, cache)
        q_latent_TAR = self._q_latent_TAR[:tokens]
        q_rotated_TAW = self._q_rotated_TAW[:tokens]
        latent.rotate_queries(
            q_PTN, self._rotation, paging.position_T, self._rope_columns, q_rotated_TAW
        )
        latent.multiply_heads(q_PTN, self._nope_columns, weights.w_uk_ARF, q_latent_TAR)
        chosen = None
        if self._indexer is not None and self._q_TM is not None:
            chosen = self._indexer.choose(layer, h_TH, self._q_TM[:tokens], paging)
        sum_TAR, heads_TO = self._sum_TAR[:tokens], self._heads_TO[:tokens]
        latent.attend_latents(
            q_latent_TAR,
            q_rotated_TAW,
            cache,
            paging,
            self._partials,
            sum_TAR,
            scale=self._scale,
            chosen=chosen,
        )
        sums_1TC = sum_TAR.view(1, tokens, -1)
        latent.multiply_heads(sums_1TC, self._sum_columns, weights.w_uv_AGR, heads_TO)
        return heads_TO

    def _project(
        self, weights: MlaWeights, h_TH: Tensor, paging: Paging, cache: latent.LatentCache
    ) -> Tensor:
        """Returns the heads' queries in the first columns of the result. Writes the latents to the
        cache."""
        in_PTC = self._in.run(h_TH, weights.w_in_CH)
        q_TM = None if self._q_TM is None else self._q_TM[: h_TH.shape[0]]
        latent.norm_and_store(
            in_PTC,
            weights.q_norm_M,
            weights.kv_norm_R,
            self._rotation,
            paging,
            q_TM,
            cache,
            eps=INNER_EPS,
        )
        if self._q is None or q_TM is None or weights.w_q_NM is None:
            return in_PTC
        return self._q.run(q_TM, weights.w_q_NM)


def _check(shape: MlaShape) -> None:
    sizes = {"kv_lora_rank": shape.rank, "qk_rope_head_dim": shape.qk_rope_head_dim}
    if shape.num_index_heads:
        sizes |= {"index_head_dim": shape.index_head_dim}
    for name, size in sizes.items():
        if size < 16 or size & (size - 1):
            raise ValueError(
                f"CUDA ranks serve a {name} that is a power of two from 16: not {size}"
            )
