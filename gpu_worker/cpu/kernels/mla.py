"""Multi-head latent attention (arXiv 2405.04434) over a paged cache of latents, and its sparse form
with the lightning indexer of DeepSeek-V3.2.

Keys and values are never expanded: W_UK is absorbed into the query, and W_UV is applied to the sum
of latents. Prefill and decode both do so, hence both give the same bits. All heads share a cached
row. Rows are read in tiles, each tile once for all heads.

More shape letters: A heads, R latent rank, W rotated size of a head, F its unrotated size, G value
size of a head, Q rank of the queries' latent, U tokens of a tile (a KV block), I heads of the
indexer, L its head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_worker.cpu.kernels.arithmetic import ONE, ZERO, fma, kernel
from gpu_worker.cpu.kernels.attention import cache_row, rotate
from gpu_worker.cpu.kernels.linear import accumulate, linear, rms_norm, softmax
from gpu_worker.cpu.kernels.warm_up import (
    FLAG,
    FLOAT,
    FLOATS_1D,
    FLOATS_2D,
    FLOATS_3D,
    INT,
    INTS_1D,
    READONLY_INTS_1D,
    READONLY_INTS_2D,
    EntryPoint,
)


@kernel
def store_latents(
    kva_TP: Any, position_T: Any, sequence_T: Any, table_SB: Any, latent_BUR: Any, key_BUW: Any,
    kva_norm_R: Any, inner_eps: Any, cos_CD: Any, sin_CD: Any, interleaved: bool,
) -> None:  # fmt: skip
    """Writes the normed latents and the rotated shared keys of the step's tokens to the cache."""
    block_tokens, rank = latent_BUR.shape[1:]
    for t in range(position_T.shape[0]):
        position = position_T[t]
        block, offset = cache_row(t, position_T, sequence_T, table_SB, block_tokens)
        rms_norm(kva_TP[t, :rank], kva_norm_R, inner_eps, latent_BUR[block, offset])
        rotate(
            kva_TP[t, rank:], cos_CD[position], sin_CD[position], interleaved,
            key_BUW[block, offset],
        )  # fmt: skip


@kernel
def absorb_queries(
    q_TP: Any, position_T: Any, w_uk_AFR: Any, cos_CD: Any, sin_CD: Any, interleaved: bool,
    zeros: Any, plain_TF: Any, latent_TR: Any, q_latent_TRA: Any, q_rotated_TWA: Any,
) -> None:  # fmt: skip
    """`q_latent_TRA`: each head's query times W_UK, to be multiplied with latents. `q_rotated_TWA`:
    its rotated part. `plain_TF` and `latent_TR` are scratch."""
    num_heads, qk_nope_head_dim, rank = w_uk_AFR.shape
    num_tokens, qk_rope_head_dim = position_T.shape[0], q_rotated_TWA.shape[1]
    head_size = qk_nope_head_dim + qk_rope_head_dim
    rotated_W = np.empty(qk_rope_head_dim, dtype=np.float32)
    for a in range(num_heads):
        for t in range(num_tokens):
            head = q_TP[t, a * head_size : (a + 1) * head_size]
            for f in range(qk_nope_head_dim):
                plain_TF[t, f] = head[f]
            position = position_T[t]
            rotate(
                head[qk_nope_head_dim:], cos_CD[position], sin_CD[position], interleaved, rotated_W
            )
            for w in range(qk_rope_head_dim):
                q_rotated_TWA[t, w, a] = rotated_W[w]
        linear(plain_TF, w_uk_AFR[a], zeros[:rank], latent_TR, num_tokens)
        for t in range(num_tokens):
            for r in range(rank):
                q_latent_TRA[t, r, a] = latent_TR[t, r]


@kernel
def _score_tile(
    latent_UR: Any, key_UW: Any, q_latent_RA: Any, q_rotated_WA: Any, scores_UA: Any, size: int
) -> None:
    """Each score is one chain: over the latent's elements, then over the rotated ones."""
    scores_UA[:size] = ZERO
    accumulate(latent_UR, q_latent_RA, scores_UA, size)
    accumulate(key_UW, q_rotated_WA, scores_UA, size)


@kernel
def _scores_to_weights(scores_CA: Any, scale: Any, size: int, weights_AC: Any) -> None:
    """Each head's weights: the softmax of its scores, which sums to one."""
    for a in range(weights_AC.shape[0]):
        weights = weights_AC[a]
        for c in range(size):
            weights[c] = scores_CA[c, a]
        total = softmax(weights, scale, size)
        inverse = ONE / total
        for c in range(size):
            weights[c] *= inverse


@kernel
def _add_tile(
    weights_AC: Any, first: int, size: int, latent_UR: Any, tile_AU: Any, sum_AR: Any
) -> None:
    """sum += weights @ latents. Rows of the tile after the last position have the weight zero."""
    for a in range(tile_AU.shape[0]):
        for u in range(tile_AU.shape[1]):
            tile_AU[a, u] = weights_AC[a, first + u] if u < size else ZERO
    accumulate(tile_AU, latent_UR, sum_AR, tile_AU.shape[0])


@kernel
def attend_dense(
    position_T: Any, sequence_T: Any, table_SB: Any, latent_BUR: Any, key_BUW: Any,
    q_latent_TRA: Any, q_rotated_TWA: Any, scale: Any, scores_CA: Any, weights_AC: Any,
    tile_AU: Any, sum_TAR: Any,
) -> None:  # fmt: skip
    """Attention of every row over all positions up to its own. `scores_CA`, `weights_AC` and
    `tile_AU` are scratch."""
    block_tokens = latent_BUR.shape[1]
    for t in range(position_T.shape[0]):
        context, table_B = position_T[t] + 1, table_SB[sequence_T[t]]
        for first in range(0, context, block_tokens):
            block = table_B[first // block_tokens]
            _score_tile(
                latent_BUR[block], key_BUW[block], q_latent_TRA[t], q_rotated_TWA[t],
                scores_CA[first : first + block_tokens], min(block_tokens, context - first),
            )  # fmt: skip
        _scores_to_weights(scores_CA, scale, context, weights_AC)
        sum_TAR[t] = ZERO
        for first in range(0, context, block_tokens):
            _add_tile(
                weights_AC, first, min(block_tokens, context - first),
                latent_BUR[table_B[first // block_tokens]], tile_AU, sum_TAR[t],
            )  # fmt: skip


@kernel
def attend_sparse(
    position_T: Any, sequence_T: Any, table_SB: Any, latent_BUR: Any, key_BUW: Any,
    index_key_BUL: Any, q_latent_TRA: Any, q_rotated_TWA: Any, q_index_TLI: Any, w_index_TI: Any,
    top_k: int, scale: Any, index_scale: Any, scores_CA: Any, weights_AC: Any, tile_AU: Any,
    latent_UR: Any, key_UW: Any, index_UI: Any, index_C: Any, chosen_C: Any, sum_TAR: Any,
) -> None:  # fmt: skip
    """Attention of every row over the `top_k` positions that the indexer scores highest, in rising
    order of position. The arguments between `index_scale` and `sum_TAR` are scratch."""
    block_tokens = latent_BUR.shape[1]
    for t in range(position_T.shape[0]):
        context, table_B = position_T[t] + 1, table_SB[sequence_T[t]]
        size = min(top_k, context)
        if size < context:
            _score_index(
                context, table_B, index_key_BUL, q_index_TLI[t], w_index_TI[t], index_scale,
                index_UI, index_C,
            )  # fmt: skip
            _choose_positions(index_C, context, size, chosen_C)
        else:
            for c in range(context):
                chosen_C[c] = c
        for first in range(0, size, block_tokens):
            count = min(block_tokens, size - first)
            _gather(table_B, chosen_C, first, count, key_BUW, key_UW)
            _gather(table_B, chosen_C, first, count, latent_BUR, latent_UR)
            _score_tile(
                latent_UR, key_UW, q_latent_TRA[t], q_rotated_TWA[t],
                scores_CA[first : first + block_tokens], count,
            )  # fmt: skip
        _scores_to_weights(scores_CA, scale, size, weights_AC)
        sum_TAR[t] = ZERO
        for first in range(0, size, block_tokens):
            count = min(block_tokens, size - first)
            _gather(table_B, chosen_C, first, count, latent_BUR, latent_UR)
            _add_tile(weights_AC, first, count, latent_UR, tile_AU, sum_TAR[t])


@kernel
def _gather(
    table_B: Any, chosen_C: Any, first: int, count: int, cache_BUR: Any, rows_UR: Any
) -> None:
    block_tokens = cache_BUR.shape[1]
    for u in range(count):
        position = chosen_C[first + u]
        rows_UR[u] = cache_BUR[table_B[position // block_tokens], position % block_tokens]


@kernel
def _score_index(
    context: int, table_B: Any, index_key_BUL: Any, q_index_LI: Any, w_index_I: Any, scale: Any,
    index_UI: Any, index_C: Any,
) -> None:  # fmt: skip
    """For each position: the sum over the indexer's heads of weight * relu(query · key)."""
    block_tokens = index_key_BUL.shape[1]
    for first in range(0, context, block_tokens):
        count = min(block_tokens, context - first)
        index_UI[:count] = ZERO
        accumulate(index_key_BUL[table_B[first // block_tokens]], q_index_LI, index_UI, count)
        for u in range(count):
            total = ZERO
            for i in range(w_index_I.shape[0]):
                total = fma(w_index_I[i], max(index_UI[u, i] * scale, ZERO), total)
            index_C[first + u] = total


@kernel
def _choose_positions(index_C: Any, context: int, size: int, chosen_C: Any) -> None:
    """The positions of the `size` largest scores, in rising order. Among equal scores the lower
    position is chosen."""
    edge = np.partition(index_C[:context], context - size)[context - size]
    above = 0
    for c in range(context):
        above += index_C[c] > edge
    equal, filled = size - above, 0
    for c in range(context):
        if index_C[c] > edge or (index_C[c] == edge and equal > 0):
            equal -= index_C[c] == edge
            chosen_C[filled] = c
            filled += 1


@kernel
def expand_sums(
    sum_TAR: Any, w_uv_ARG: Any, zeros: Any, latent_TR: Any, value_TG: Any, heads_TO: Any,
    num_tokens: int,
) -> None:  # fmt: skip
    """Each head's value: its sum of latents times W_UV. `latent_TR` and `value_TG` are scratch."""
    num_heads, rank, v_head_dim = w_uv_ARG.shape
    for a in range(num_heads):
        for t in range(num_tokens):
            for r in range(rank):
                latent_TR[t, r] = sum_TAR[t, a, r]
        linear(latent_TR, w_uv_ARG[a], zeros[:v_head_dim], value_TG, num_tokens)
        for t in range(num_tokens):
            for g in range(v_head_dim):
                heads_TO[t, a * v_head_dim + g] = value_TG[t, g]


@kernel
def store_index_keys(
    key_TL: Any, position_T: Any, sequence_T: Any, table_SB: Any, index_key_BUL: Any, norm_L: Any,
    bias_L: Any, eps: Any, cos_CD: Any, sin_CD: Any,
) -> None:  # fmt: skip
    """Writes the indexer's keys of the step's tokens to their cache: a layer norm, then a rotation
    of the first elements, paired by halves."""
    block_tokens, size = index_key_BUL.shape[1:]
    rotated = 2 * cos_CD.shape[1]
    for t in range(position_T.shape[0]):
        position = position_T[t]
        block, offset = cache_row(t, position_T, sequence_T, table_SB, block_tokens)
        out = index_key_BUL[block, offset]
        _layer_norm(key_TL[t], norm_L, bias_L, eps, key_TL[t])
        rotate(key_TL[t, :rotated], cos_CD[position], sin_CD[position], False, out[:rotated])
        for i in range(rotated, size):
            out[i] = key_TL[t, i]


@kernel
def _layer_norm(x: Any, weight: Any, bias: Any, eps: Any, out: Any) -> None:
    size = x.shape[0]
    mean = ZERO
    for i in range(size):
        mean += x[i]
    mean /= np.float32(size)
    variance = ZERO
    for i in range(size):
        variance = fma(x[i] - mean, x[i] - mean, variance)
    scale = ONE / np.sqrt(variance / np.float32(size) + eps)
    for i in range(size):
        out[i] = fma((x[i] - mean) * scale, weight[i], bias[i])


@kernel
def rotate_index_queries(
    q_TP: Any, position_T: Any, cos_CD: Any, sin_CD: Any, q_index_TLI: Any
) -> None:
    """The indexer's queries, rotated in pairs by halves, with the head as the last axis."""
    size, num_heads = q_index_TLI.shape[1:]
    rotated = 2 * cos_CD.shape[1]
    rotated_W = np.empty(rotated, dtype=np.float32)
    for t in range(position_T.shape[0]):
        position = position_T[t]
        for i in range(num_heads):
            head = q_TP[t, i * size : (i + 1) * size]
            rotate(head[:rotated], cos_CD[position], sin_CD[position], False, rotated_W)
            for n in range(size):
                q_index_TLI[t, n, i] = rotated_W[n] if n < rotated else head[n]


@kernel
def project(x_MK: Any, w_KN: Any, bias_N: Any, out_MN: Any, num_rows: int) -> None:
    """`linear`, for callers that are not kernels."""
    linear(x_MK, w_KN, bias_N, out_MN, num_rows)


@kernel
def scale_rows(x_TH: Any, factor: Any, num_rows: int) -> None:
    for t in range(num_rows):
        for i in range(x_TH.shape[1]):
            x_TH[t, i] *= factor


F1, F2, F3 = FLOATS_1D, FLOATS_2D, FLOATS_3D
_BATCH = (READONLY_INTS_1D, READONLY_INTS_1D, READONLY_INTS_2D)

ENTRY_POINTS: list[EntryPoint] = [
    (store_latents, (F2, *_BATCH, F3, F3, F1, FLOAT, F2, F2, FLAG)),
    (absorb_queries, (F2, READONLY_INTS_1D, F3, F2, F2, FLAG, F1, F2, F2, F3, F3)),
    (attend_dense, (*_BATCH, F3, F3, F3, F3, FLOAT, F2, F2, F2, F3)),
    (expand_sums, (F3, F3, F1, F2, F2, F2, INT)),
    (project, (F2, F2, F1, F2, INT)),
]

SPARSE_ENTRY_POINTS: list[EntryPoint] = [
    (
        attend_sparse,
        (
            *_BATCH, F3, F3, F3, F3, F3, F3, F2, INT, FLOAT, FLOAT, F2, F2, F2, F2, F2, F2, F1,
            INTS_1D, F3,
        ),
    ),
    (store_index_keys, (F2, *_BATCH, F3, F1, F1, FLOAT, F2, F2)),
    (rotate_index_queries, (F2, READONLY_INTS_1D, F2, F2, F3)),
    (scale_rows, (F2, FLOAT, INT)),
]  # fmt: skip
