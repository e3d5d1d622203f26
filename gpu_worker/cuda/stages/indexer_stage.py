"""The indexer of latent attention in a step, with its paged cache of keys. It selects the positions
that each row sees. It is needed only for contexts longer than what it selects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.cuda.kernels import indexer
from gpu_worker.cuda.kernels.latent import Rotation, SelectedPositions
from gpu_worker.cuda.kernels.paging import Paging
from gpu_worker.cuda.stages.gemm import Gemm, StepAllocator
from gpu_worker.cuda.weights.decoder_weights import IndexerWeights

INNER_EPS = 1e-6
"""The epsilon of the norms of latents and of the indexer's keys, as the published code fixes it."""
_ROWS_AT_ONCE = 128
"""Bounds the memory for scores; changes no bit."""


class IndexerStage:
    """All layers' indexers. Shape letters as in `kernels.indexer`."""

    def __init__(
        self,
        shape: MlaShape,
        weights: Sequence[IndexerWeights],
        rotation: Rotation,
        allocator: StepAllocator,
        *,
        kv_blocks: int,
        block_tokens: int,
        context_tokens_max: int,
    ) -> None:
        self._weights = weights
        self._rotation = rotation
        self._block_tokens = block_tokens
        self._top_k = shape.index_top_k
        tokens, heads, size = allocator.tokens_max, shape.num_index_heads, shape.index_head_dim
        self.key_LBUZ = allocator.zeros(len(weights), kv_blocks, block_tokens, size)
        self._in = Gemm(allocator, inner=shape.hidden_size, columns=size + heads)
        self._q = Gemm(allocator, inner=shape.q_lora_rank, columns=heads * size)
        self._q_TYZ = allocator.zeros(tokens, heads, size)
        self._weight_TY = allocator.zeros(tokens, heads, of=torch.float32)
        scores = (min(tokens, _ROWS_AT_ONCE), context_tokens_max)
        self._score_TC = allocator.zeros(*scores, of=torch.float32)
        self._cached_TK = allocator.zeros(tokens, shape.index_top_k, of=torch.int32)
        self._last_T = allocator.zeros(tokens, of=torch.int32)

    def choose(self, layer: int, h_TH: Tensor, q_TM: Tensor, paging: Paging) -> SelectedPositions:
        """Writes the rows' own keys to the cache, then selects positions from the normed stream
        `h_TH` and the queries' normed latent `q_TM`. The result is valid until the next call."""
        rows = h_TH.shape[0]
        weights, key_BUZ = self._weights[layer], self.key_LBUZ[layer]
        q_TYZ, weight_TY = self._q_TYZ[:rows], self._weight_TY[:rows]
        indexer.norm_and_store_keys(
            self._in.run(h_TH, weights.w_in_CH),
            weights.k_norm_Z,
            weights.k_bias_Z,
            self._rotation,
            paging,
            key_BUZ,
            weight_TY,
            eps=INNER_EPS,
        )
        q_PTN = self._q.run(q_TM, weights.w_q_NM)
        indexer.rotate_index_queries(
            q_PTN, self._rotation, paging.position_T, q_TYZ, top_k=self._top_k
        )
        chosen = SelectedPositions(self._cached_TK[:rows], self._last_T[:rows])
        for first in range(0, rows, _ROWS_AT_ONCE):
            part = slice(first, min(first + _ROWS_AT_ONCE, rows))
            score_TC = self._score_TC[: part.stop - first]
            own_paging = paging._replace(
                position_T=paging.position_T[part], sequence_T=paging.sequence_T[part]
            )
            own = SelectedPositions(chosen.cached_TK[part], chosen.last_T[part])
            indexer.score_positions(
                q_TYZ[part], weight_TY[part], key_BUZ, own_paging, score_TC, top_k=self._top_k
            )
            indexer.select_positions(score_TC, own_paging, own, block_tokens=self._block_tokens)
        return chosen
