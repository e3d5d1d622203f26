"""Attention with grouped query heads over a paged KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, QK_NORM_WHOLE
from gpu_worker.cpu.kernels.arithmetic import ZERO, exp32, kernel
from gpu_worker.cpu.kernels.attention import cache_row, rotate
from gpu_worker.cpu.kernels.linear import (
    accumulate_block,
    add_rows,
    linear,
    norm_rows,
    rms_norm,
    softmax,
)
from gpu_worker.cpu.kernels.tiles import LANES, ROWS_MAX_WIDE, accumulate_tile
from gpu_worker.cpu.kernels.warm_up import (
    FLOAT,
    FLOATS_1D,
    FLOATS_2D,
    FLOATS_4D,
    INT,
    PANELS,
    READONLY_INTS_1D,
    READONLY_INTS_2D,
    EntryPoint,
)


@kernel
def _store_qkv(
    qkv_P: Any, block: int, offset: int, k_cache: Any, v_cache: Any, qk_norm: int, q_norm: Any,
    k_norm: Any, clip: Any, eps: Any, cos: Any, sin: Any,
) -> None:  # fmt: skip
    """Norms, clips and rotates one token's query and key heads in place. Then copies the key and
    value heads into row `offset` of `block`. `cos` and `sin` are those of the token's position."""
    num_kv_heads, head_size = k_cache.shape[1:3]
    num_heads = qkv_P.shape[0] // head_size - 2 * num_kv_heads
    keys, values = num_heads * head_size, (num_heads + num_kv_heads) * head_size
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
        rotate(head, cos, sin, False, head)
    for h in range(num_kv_heads):
        key, value = keys + h * head_size, values + h * head_size
        for i in range(head_size):
            k_cache[block, h, i, offset] = qkv_P[key + i]
            v_cache[block, h, offset, i] = qkv_P[value + i]


@kernel
def _score(
    q_RD: Any, k_NDU: Any, head: int, num_heads: int, table_B: Any, first: int, end: int,
    scores_RC: Any,
) -> None:  # fmt: skip
    """Scores of all rows with the keys of blocks first … end-1. The keys of a block are
    `[D, block_tokens]`, so each score is a chain in order of D; several blocks advance side by
    side."""
    rows, head_size, block_tokens = q_RD.shape[0], k_NDU.shape[1], k_NDU.shape[2]
    scores_RC[:rows, first * block_tokens : end * block_tokens] = ZERO
    b = first
    while block_tokens == LANES and b + 4 <= end:
        at = (
            table_B[b] * num_heads + head,
            table_B[b + 1] * num_heads + head,
            table_B[b + 2] * num_heads + head,
            table_B[b + 3] * num_heads + head,
        )
        for m in range(0, rows, ROWS_MAX_WIDE):
            group = min(ROWS_MAX_WIDE, rows - m)
            accumulate_tile(group, 1, q_RD, m, 0, k_NDU, at, 0, head_size, scores_RC, b * LANES)
        b += 4
    while b < end:
        block = table_B[b] * num_heads + head
        accumulate_block(q_RD, 0, k_NDU, block, 0, head_size, scores_RC, b * block_tokens, rows)
        b += 1


@kernel
def _add_values(
    scores_RC: Any, v_NUD: Any, head: int, num_heads: int, table_B: Any, begin: int, end: int,
    out_RD: Any,
) -> None:  # fmt: skip
    """out += weights @ values, for positions begin … end-1."""
    block_tokens = v_NUD.shape[1]
    position = begin
    while position < end:
        b = position // block_tokens
        first = b * block_tokens
        high = min(end, first + block_tokens)
        accumulate_block(
            scores_RC, position, v_NUD, table_B[b] * num_heads + head, position - first,
            high - position, out_RD, 0, out_RD.shape[0],
        )  # fmt: skip
        position = high


@kernel
def _scores_to_weights(
    group: int, context: int, window: int, sinks_G: Any, scale: Any, scores_RC: Any, totals_R: Any
) -> None:
    """Turns scores into weights that are still to be divided by `totals_R`. Rows are the G heads of
    one token, then those of the next. `context` is the first token's. A sink adds to the total and
    has no value."""
    for r in range(totals_R.shape[0]):
        end = context + r // group
        begin = max(0, end - window) if window else 0
        scores = scores_RC[r, begin:end]
        top = scores.max() if sinks_G.shape[0] else ZERO
        totals_R[r] = softmax(scores, scale, end - begin)
        if sinks_G.shape[0]:
            totals_R[r] += exp32(sinks_G[r % group] - top * scale)


@kernel
def _attend_tile(
    q_RD: Any, group: int, context: int, window: int, head: int, num_heads: int, table_B: Any,
    k_NDU: Any, v_NUD: Any, sinks_G: Any, scale: Any, scores_RC: Any, totals_R: Any, out_RD: Any,
) -> None:  # fmt: skip
    """A few consecutive tokens of a sequence, with `group` query heads each, which share a KV head.
    A block that all these tokens see in full is read once for all of them."""
    tokens = q_RD.shape[0] // group
    block_tokens = k_NDU.shape[2]
    last = context + tokens - 1
    first_begin = max(0, context - window) if window else 0
    last_begin = max(0, last - window) if window else 0
    _score(
        q_RD, k_NDU, head, num_heads, table_B, first_begin // block_tokens,
        (last + block_tokens - 1) // block_tokens, scores_RC,
    )  # fmt: skip
    _scores_to_weights(group, context, window, sinks_G, scale, scores_RC, totals_R)
    out_RD[:, :] = ZERO
    common = (last_begin + block_tokens - 1) // block_tokens * block_tokens
    common_end = max(common, context // block_tokens * block_tokens)
    for i in range(tokens):
        rows = slice(i * group, (i + 1) * group)
        end = context + i
        begin = max(0, end - window) if window else 0
        _add_values(
            scores_RC[rows], v_NUD, head, num_heads, table_B, begin, min(common, end), out_RD[rows]
        )
    _add_values(scores_RC, v_NUD, head, num_heads, table_B, common, common_end, out_RD)
    for i in range(tokens):
        rows = slice(i * group, (i + 1) * group)
        _add_values(
            scores_RC[rows], v_NUD, head, num_heads, table_B, common_end, context + i, out_RD[rows]
        )
    for r in range(out_RD.shape[0]):
        for d in range(out_RD.shape[1]):
            out_RD[r, d] /= totals_R[r]


@kernel
def _tile_end(t: int, tokens_max: int, position_T: Any, sequence_T: Any) -> int:
    """Of the tile that begins with token t."""
    end = t + 1
    while (
        end < position_T.shape[0]
        and end - t < tokens_max
        and sequence_T[end] == sequence_T[t]
        and position_T[end] == position_T[end - 1] + 1
    ):
        end += 1
    return end


@kernel
def attend_rows(
    qkv_TP: Any, position_T: Any, sequence_T: Any, table_SB: Any, k_cache: Any, v_cache: Any,
    window: int, sinks_A: Any, scale: Any, scores_RC: Any, out_TO: Any,
) -> None:  # fmt: skip
    """Attention of every row, in tiles of as many rows as `scores_RC` has."""
    num_blocks, num_kv_heads, head_size, block_tokens = k_cache.shape
    k_NDU = k_cache.reshape(num_blocks * num_kv_heads, head_size, block_tokens)
    v_NUD = v_cache.reshape(num_blocks * num_kv_heads, block_tokens, head_size)
    group = out_TO.shape[1] // (head_size * num_kv_heads)
    tokens_max = scores_RC.shape[0] // group
    q_RD = np.empty((scores_RC.shape[0], head_size), dtype=np.float32)
    out_RD = np.empty((scores_RC.shape[0], head_size), dtype=np.float32)
    totals_R = np.empty(scores_RC.shape[0], dtype=np.float32)
    t = 0
    while t < position_T.shape[0]:
        end = _tile_end(t, tokens_max, position_T, sequence_T)
        rows = (end - t) * group
        for j in range(num_kv_heads):
            for r in range(rows):
                first = (j * group + r % group) * head_size
                q_RD[r] = qkv_TP[t + r // group, first : first + head_size]
            _attend_tile(
                q_RD[:rows], group, position_T[t] + 1, window, j, num_kv_heads,
                table_SB[sequence_T[t]], k_NDU, v_NUD, sinks_A[j * group : (j + 1) * group], scale,
                scores_RC, totals_R[:rows], out_RD[:rows],
            )  # fmt: skip
            for r in range(rows):
                first = (j * group + r % group) * head_size
                out_TO[t + r // group, first : first + head_size] = out_RD[r]
        t = end


@kernel
def attend(
    x_TH: Any, position_T: Any, sequence_T: Any, table_SB: Any, k_cache: Any, v_cache: Any,
    norm_H: Any, w_qkv: Any, b_qkv: Any, q_norm: Any, k_norm: Any, w_o: Any, b_o: Any, sinks_A: Any,
    cos_CD: Any, sin_CD: Any, eps: Any, scale: Any, qk_norm: int, clip: Any, window: int,
    h_TH: Any, qkv_TP: Any, out_TO: Any, scores_RC: Any,
) -> None:  # fmt: skip
    """The attention half of a layer: x += attention(norm(x)). Writes the tokens' KV first, then
    computes the attention of every row. `sinks_A` has one entry for each of the A query heads, or
    is empty. `clip` and `window` (tokens that a row sees, itself included) are off at 0. `h_TH`,
    `qkv_TP`, `out_TO` and `scores_RC` are scratch."""
    num_tokens, block_tokens = position_T.shape[0], k_cache.shape[3]
    norm_rows(x_TH, norm_H, eps, h_TH, num_tokens)
    linear(h_TH, w_qkv, b_qkv, qkv_TP, num_tokens)
    for t in range(num_tokens):
        block, offset = cache_row(t, position_T, sequence_T, table_SB, block_tokens)
        _store_qkv(
            qkv_TP[t], block, offset, k_cache, v_cache, qk_norm, q_norm, k_norm, clip, eps,
            cos_CD[position_T[t]], sin_CD[position_T[t]],
        )  # fmt: skip
    attend_rows(
        qkv_TP, position_T, sequence_T, table_SB, k_cache, v_cache, window, sinks_A, scale,
        scores_RC, out_TO,
    )  # fmt: skip
    linear(out_TO, w_o, b_o, h_TH, num_tokens)
    add_rows(x_TH, h_TH, num_tokens)


ENTRY_POINTS: list[EntryPoint] = [
    (
        attend,
        (
            FLOATS_2D, READONLY_INTS_1D, READONLY_INTS_1D, READONLY_INTS_2D, FLOATS_4D, FLOATS_4D,
            FLOATS_1D, PANELS, FLOATS_1D, FLOATS_1D, FLOATS_1D, PANELS, FLOATS_1D, FLOATS_1D,
            FLOATS_2D, FLOATS_2D, FLOAT, FLOAT, INT, FLOAT, INT, FLOATS_2D, FLOATS_2D, FLOATS_2D,
            FLOATS_2D,
        ),
    )
]  # fmt: skip
