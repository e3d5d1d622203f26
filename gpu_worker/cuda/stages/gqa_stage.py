"""Grouped-query attention of a step, with its paged cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.checkpoint.gqa_shape import QK_NORM_WHOLE, GqaShape
from gpu_worker.checkpoint.rope import Rope
from gpu_worker.cuda.kernels import attention, chunk_attention, splits
from gpu_worker.cuda.kernels.paging import Paging
from gpu_worker.cuda.kernels.projected_heads import QkvParts, norm_scales, rotate_and_store
from gpu_worker.cuda.stages.gemm import Gemm, StepAllocator
from gpu_worker.cuda.weights.decoder_weights import GqaWeights

_CACHE_VALUES_MAX = 2**31 - 1
"""Of one layer's keys: `paging.cache_rows` counts in 32 bits."""


class GqaStage:
    """Implements `attention_stage.AttentionStage`. Shape letters as in `kernels`."""

    def __init__(
        self,
        shape: GqaShape,
        weights: Sequence[GqaWeights],
        rope: Rope,
        allocator: StepAllocator,
        *,
        kv_blocks: int,
        block_tokens: int,
        context_tokens_max: int,
        decode_rows_max: int,
        norm_eps: float,
        windows: Sequence[int],
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """Steps that are not in tiles have at most `decode_rows_max` rows. `windows` are those of
        the layers; 0: none. `kv_dtype`: see `kernels.cached_values`. Raises ValueError for a cache
        that kernels cannot address."""
        self._shape = shape
        self._weights = weights
        self._kinds = [
            splits.WindowAndSinks(window, _for_powers_of_two(own.sinks_Q))
            for window, own in zip(windows, weights, strict=True)
        ]
        self._eps = norm_eps
        cache = (len(weights), kv_blocks, shape.num_kv_heads, block_tokens, shape.head_dim)
        if math.prod(cache[1:]) > _CACHE_VALUES_MAX:
            raise ValueError(
                f"a layer's keys of {kv_blocks * block_tokens:,} tokens are more than "
                f"{_CACHE_VALUES_MAX:,} values; a rank holds fewer tokens (--kv-tokens)"
            )
        self.k_LBJUD = allocator.zeros(*cache, of=kv_dtype)
        self.v_LBJUD = allocator.zeros(*cache, of=kv_dtype)
        rotated = int(shape.head_dim * rope.rotated_share)
        cos_CD, sin_CD = rope.rotations(rotated, context_tokens_max)
        self._cos_CD = torch.from_numpy(cos_CD).to(allocator.device)
        self._sin_CD = torch.from_numpy(sin_CD).to(allocator.device)
        hidden = weights[0].w_qkv_CH.shape[1]
        self._qkv = Gemm(allocator, inner=hidden, columns=shape.q_size + 2 * shape.kv_size)
        self._scales_T2 = None
        if shape.qk_norm == QK_NORM_WHOLE:
            self._scales_T2 = allocator.zeros(allocator.tokens_max, 2, of=torch.float32)
        self._q_TQD = allocator.zeros(allocator.tokens_max, shape.num_heads, shape.head_dim)
        self._heads_TO = allocator.zeros(allocator.tokens_max, shape.q_size)
        splits_max = -(-context_tokens_max // attention.SPLIT_TOKENS)
        spans_max = -(-splits_max // splits.SPAN)
        heads, head_dim, device = shape.num_heads, shape.head_dim, allocator.device
        tokens = allocator.tokens_max
        self._partials = splits.new_partials(decode_rows_max, heads, splits_max, head_dim, device)
        self._spans = splits.spans_view(self._partials, spans_max)
        spans_rows = self._spans.maximum_TQX.shape[0]
        self._apart_rows_max = min(spans_rows, chunk_attention.SPANS_APART_ROWS_MAX)
        self._merged_TQD = allocator.zeros(tokens, heads, head_dim, of=torch.float32)
        rows = min(decode_rows_max, attention.FUSED_ATTENTION_ROWS_MAX)
        self._merging = attention.MergeBuffers(
            splits.new_partials(rows, heads, spans_max, head_dim, device),
            allocator.zeros(rows, shape.num_kv_heads, 1 + spans_max, of=torch.int32),
        )

    def cache(self) -> tuple[Tensor, ...]:
        return (self.k_LBJUD, self.v_LBJUD)

    def run(self, layer: int, h_TH: Tensor, paging: Paging) -> Tensor:
        weights, tokens = self._weights[layer], h_TH.shape[0]
        k_BJUD, v_BJUD = self.k_LBJUD[layer], self.v_LBJUD[layer]
        q_TQD, heads_TO = self._q_TQD[:tokens], self._heads_TO[:tokens]
        kind, qkv_parts = self._kinds[layer], self._project(weights, h_TH)
        if paging.tiles_C2 is not None:
            rotate_and_store(qkv_parts, paging, q_TQD, k_BJUD, v_BJUD)
            spans = self._spans if tokens <= self._apart_rows_max else None
            chunk_attention.attend_chunks(
                q_TQD, k_BJUD, v_BJUD, paging, self._merged_TQD, heads_TO, kind=kind, spans=spans
            )
            return heads_TO
        attention.attend_projected(
            qkv_parts,
            paging,
            q_TQD,
            k_BJUD,
            v_BJUD,
            self._partials,
            self._merging,
            heads_TO,
            kind=kind,
        )
        return heads_TO

    def _project(self, weights: GqaWeights, h_TH: Tensor) -> QkvParts:
        shape, scales_T2 = self._shape, self._scales_T2
        qkv_parts = QkvParts(
            self._qkv.run(h_TH, weights.w_qkv_CH),
            weights.q_norm,
            weights.k_norm,
            self._cos_CD,
            self._sin_CD,
            self._eps,
            bias_C=weights.b_qkv_C,
            scales_T2=None if scales_T2 is None else scales_T2[: h_TH.shape[0]],
            clip=shape.clip,
        )
        if scales_T2 is not None:
            norm_scales(qkv_parts, q_size=shape.q_size, kv_size=shape.kv_size)
        return qkv_parts


def _for_powers_of_two(sinks_Q: Tensor | None) -> Tensor | None:
    return None if sinks_Q is None else sinks_Q * attention.LOG2_E
