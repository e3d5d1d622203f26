"""Attention with grouped query heads over a paged KV cache."""

from __future__ import annotations

from typing import Any

from gpu_worker.model.gqa_shape import QK_NORM_HEAD, QK_NORM_WHOLE
from gpu_worker.model.kernels.arithmetic import ZERO, exp32, kernel
from gpu_worker.model.kernels.linear import (
    add_rows,
    advance_row,
    linear,
    norm_rows,
    rms_norm,
    softmax,
)
from gpu_worker.model.kernels.warm_up import (
    FLOAT,
    FLOATS_1D,
    FLOATS_2D,
    FLOATS_4D,
    GIVEN_INTS_1D,
    GIVEN_INTS_2D,
    INT,
    EntryPoint,
)


@kernel
def _rotate(head: Any, cos: Any, sin: Any) -> None:
    """The first half of the rotated elements with the second; what lies beyond stays."""
    half = cos.shape[0]
    for i in range(half):
        low, high = head[i], head[i + half]
        head[i] = low * cos[i] - high * sin[i]
        head[i + half] = high * cos[i] + low * sin[i]


@kernel
def _place_qkv(
    qkv_P: Any, position: int, block: int, k_cache: Any, v_cache: Any, qk_norm: int,
    q_norm: Any, k_norm: Any, clip: Any, eps: Any, cos_CD: Any, sin_CD: Any,
) -> None:  # fmt: skip
    """Norms, clips and rotates the query heads in place, the key heads into the cache, and copies
    the value heads there."""
    num_kv_heads, head_size, block_tokens = k_cache.shape[1:]
    num_heads = qkv_P.shape[0] // head_size - 2 * num_kv_heads
    keys, values = num_heads * head_size, (num_heads + num_kv_heads) * head_size
    cos, sin = cos_CD[position], sin_CD[position]
    offset = position % block_tokens
    if qk_norm == QK_NORM_WHOLE:
        rms_norm(qkv_P[:keys], q_norm, eps, qkv_P[:keys])
        rms_norm(qkv_P[keys:values], k_norm, eps, qkv_P[keys:values])
    if clip > ZERO:
        for i in range(qkv_P.shape[0]):
            qkv_P[i] = min(max(qkv_P[i], -clip), clip)
    for h in range(num_heads + num_kv_heads):
        head = qkv_P[h * head_size : (h + 1) * head_size]
        if qk_norm == QK_NORM_HEAD:
            rms_norm(head, q_norm if h < num_heads else k_norm, eps, head)
        _rotate(head, cos, sin)
    for h in range(num_kv_heads):
        key, value = keys + h * head_size, values + h * head_size
        for i in range(head_size):
            k_cache[block, h, i, offset] = qkv_P[key + i]
            v_cache[block, h, offset, i] = qkv_P[value + i]


@kernel
def _attend_heads(
    q_GD: Any, kv_head: int, table_B: Any, begin: int, context: int, k_cache: Any, v_cache: Any,
    sinks_G: Any, scale: Any, scores_GC: Any, out_GD: Any,
) -> None:  # fmt: skip
    """One query row, the G heads that share `kv_head`, over positions begin … context-1. Keys lie
    as [D, block_tokens] in a block, so that scores too are chains in order of D. A sink takes part
    in the softmax's sum, and gives nothing."""
    block_tokens = k_cache.shape[3]
    first_block = begin // block_tokens * block_tokens
    for first in range(first_block, context, block_tokens):
        keys = k_cache[table_B[first // block_tokens], kv_head]
        for g in range(q_GD.shape[0]):
            scores = scores_GC[g, first : first + block_tokens]
            scores[:] = ZERO
            advance_row(q_GD[g], keys, scores, 0, block_tokens)
    out_GD[:, :] = ZERO
    for g in range(q_GD.shape[0]):
        scores = scores_GC[g, begin:context]
        top = scores.max() if sinks_G.shape[0] else ZERO
        total = softmax(scores, scale, context - begin)
        if sinks_G.shape[0]:
            total += exp32(sinks_G[g] - top * scale)
        for first in range(first_block, context, block_tokens):
            low, high = max(begin, first), min(first + block_tokens, context)
            values = v_cache[table_B[first // block_tokens], kv_head, low - first : high - first]
            advance_row(scores_GC[g, low:high], values, out_GD[g], 0, out_GD.shape[1])
        for i in range(out_GD.shape[1]):
            out_GD[g, i] /= total


@kernel
def attend(
    x_TH: Any, position_T: Any, sequence_T: Any, table_SB: Any, k_cache: Any, v_cache: Any,
    norm_H: Any, w_qkv: Any, b_qkv: Any, q_norm: Any, k_norm: Any, w_o: Any, b_o: Any, sinks_A: Any,
    cos_CD: Any, sin_CD: Any, eps: Any, scale: Any, qk_norm: int, clip: Any, window: int,
    h_TH: Any, qkv_TP: Any, out_TO: Any, scores_GC: Any,
) -> None:  # fmt: skip
    """The attention half of a layer: x += attention(norm(x)). Writes the tokens' KV first, then
    lets every row attend on its own. `sinks_A` has one for each of the A query heads, or none;
    `clip` and `window` (tokens that a row sees, itself included) are off at 0. `h_TH`, `qkv_TP`,
    `out_TO` and `scores_GC` are scratch."""
    num_tokens = position_T.shape[0]
    num_kv_heads, head_size, block_tokens = k_cache.shape[1:]
    group = out_TO.shape[1] // (head_size * num_kv_heads)
    norm_rows(x_TH, norm_H, eps, h_TH, num_tokens)
    linear(h_TH, w_qkv, b_qkv, qkv_TP, num_tokens)
    for t in range(num_tokens):
        position = position_T[t]
        block = table_SB[sequence_T[t], position // block_tokens]
        _place_qkv(
            qkv_TP[t], position, block, k_cache, v_cache, qk_norm, q_norm, k_norm, clip, eps,
            cos_CD, sin_CD,
        )  # fmt: skip
    for t in range(num_tokens):
        context = position_T[t] + 1
        begin = max(0, context - window) if window else 0
        for j in range(num_kv_heads):
            first, last = j * group * head_size, (j + 1) * group * head_size
            _attend_heads(
                qkv_TP[t, first:last].reshape(group, head_size), j, table_SB[sequence_T[t]], begin,
                context, k_cache, v_cache, sinks_A[j * group : (j + 1) * group], scale, scores_GC,
                out_TO[t, first:last].reshape(group, head_size),
            )  # fmt: skip
    linear(out_TO, w_o, b_o, h_TH, num_tokens)
    add_rows(x_TH, h_TH, num_tokens)


ENTRY_POINTS: list[EntryPoint] = [
    (
        attend,
        (
            FLOATS_2D, GIVEN_INTS_1D, GIVEN_INTS_1D, GIVEN_INTS_2D, FLOATS_4D, FLOATS_4D, FLOATS_1D,
            FLOATS_2D, FLOATS_1D, FLOATS_1D, FLOATS_1D, FLOATS_2D, FLOATS_1D, FLOATS_1D, FLOATS_2D,
            FLOATS_2D, FLOAT, FLOAT, INT, FLOAT, INT, FLOATS_2D, FLOATS_2D, FLOATS_2D, FLOATS_2D,
        ),
    )
]  # fmt: skip
