"""Grouped-query attention over the paged KV cache, in splits of a fixed number of positions, and
the merge of the splits. With a window, splits that lie wholly before it are neither read nor
merged.

The cache is `k_BJUD` and `v_BJUD`, in a format of `cached_values`. A *tile* is one or more tokens
of one sequence at rising positions, so that a prefill chunk reads each key once per tile. A row
position of -1 means that the row has no token.

If there are few sequences with one token each, attention is one kernel. Each program rotates its
own queries. Only the program that stores a new key and value reads it. The last program of a span
of splits merges that span, and the last program of all spans merges the spans.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.cached_values import to_cached
from gpu_worker.cuda.kernels.paging import Paging, cache_row, cache_rows
from gpu_worker.cuda.kernels.projected_heads import ROTATION_WARPS, QkvParts, rotate_and_store
from gpu_worker.cuda.kernels.rotated_heads import rotated_key, rotated_queries, summed_value
from gpu_worker.cuda.kernels.splits import (
    SEES_ALL,
    SPAN,
    Partials,
    WindowAndSinks,
    first_split_of,
    merge_after,
    merge_splits,
    store_partials,
)

SPLIT_TOKENS = 64
LOG2_E = 1.4426950408889634
FUSED_ATTENTION_ROWS_MAX = 2
"""With more rows, rotating the same queries in every split costs more than a second launch."""


class AttentionTile(NamedTuple):
    """Launch parameters. None of them changes a bit of the result."""

    warps: int
    stages: int
    programs: int


ATTENTION_TILE = AttentionTile(warps=2, stages=1, programs=2048)


class MergeBuffers(NamedTuple):
    """Buffers for merging within the attention kernel.

    `spans` holds the partial results of spans. `arrivals_TJY` (int32) counts per row and KV head
    the finished spans, then the finished splits of each span. It is zero between launches.
    """

    spans: Partials
    arrivals_TJY: torch.Tensor


class FusedInputs(NamedTuple):
    """The inputs of attention that also does the rotation and the merge."""

    qkv_parts: QkvParts
    merging: MergeBuffers


def attend_projected(
    qkv_parts: QkvParts,
    paging: Paging,
    q_TQD: torch.Tensor,
    k_BJUD: torch.Tensor,
    v_BJUD: torch.Tensor,
    partials: Partials,
    merging: MergeBuffers,
    out_TC: torch.Tensor,
    *,
    kind: WindowAndSinks = SEES_ALL,
) -> None:
    """Does `rotate_and_store`, then `attend`. If there are few rows and each is the only one of its
    sequence (`tiles_C2` is None), one kernel does both and gives the same bits. `q_TQD` is scratch
    for the rotated queries."""
    if paging.tiles_C2 is None and q_TQD.shape[0] <= FUSED_ATTENTION_ROWS_MAX:
        fused_inputs = FusedInputs(qkv_parts, merging)
        attend(
            q_TQD, k_BJUD, v_BJUD, paging, partials, out_TC, kind=kind, fused_inputs=fused_inputs
        )
        return
    rotate_and_store(qkv_parts, paging, q_TQD, k_BJUD, v_BJUD)
    attend(q_TQD, k_BJUD, v_BJUD, paging, partials, out_TC, kind=kind)


def attend(
    q_TQD: torch.Tensor,
    k_BJUD: torch.Tensor,
    v_BJUD: torch.Tensor,
    paging: Paging,
    partials: Partials,
    out_TC: torch.Tensor,
    *,
    kind: WindowAndSinks = SEES_ALL,
    fused_inputs: FusedInputs | None = None,
    tile: AttentionTile | None = None,
) -> None:
    """Writes the heads side by side to `out_TC`.

    Without `fused_inputs`, all keys and values are already in the cache, `q_TQD` holds the rotated
    queries, and a second kernel merges the splits. With them, this one kernel does everything: see
    `attend_projected`.
    """
    rows, heads, head_dim = q_TQD.shape
    _, num_kv_heads, block_tokens, _ = k_BJUD.shape
    tile = tile or ATTENTION_TILE
    group = triton.next_power_of_2(heads // num_kv_heads)
    num_tiles = rows if paging.tiles_C2 is None else paging.tiles_C2.shape[0]
    splits_max = partials.maximum_TQX.shape[2]
    seen_max = kind.splits_seen_max(splits_max, SPLIT_TOKENS)
    side_by_side = max(1, min(seen_max, tile.programs // (num_tiles * num_kv_heads)))
    qkv_parts = QkvParts(q_TQD, None, None, q_TQD, q_TQD, 0.0)
    merging = MergeBuffers(partials, paging.position_T)
    if fused_inputs is not None:
        qkv_parts, merging = fused_inputs
    _attend_splits[(num_tiles, num_kv_heads, side_by_side)](
        q_TQD,
        k_BJUD,
        v_BJUD,
        paging.position_T,
        paging.sequence_T,
        paging.tables_SB,
        paging.position_T if paging.tiles_C2 is None else paging.tiles_C2,
        *partials,
        *qkv_parts.arguments(),
        *merging.spans,
        merging.arrivals_TJY,
        kind.sinks_or(out_TC),
        out_TC,
        head_dim**-0.5 * LOG2_E,
        rows * (heads + 2 * num_kv_heads) * head_dim,
        paging.tables_SB.shape[1],
        splits_max,
        merging.spans.maximum_TQX.shape[2],
        PARTS=0 if fused_inputs is None else qkv_parts.qkv_PTC.shape[0],
        HEADS=heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        GROUP=group,
        ROWS=max(16, group * paging.tile_tokens),
        SPLIT=SPLIT_TOKENS,
        BLOCK_TOKENS=block_tokens,
        SPAN=SPAN,
        TILED=paging.tiles_C2 is not None,
        **kind.form(),
        **qkv_parts.form(),
        num_warps=tile.warps if fused_inputs is None else ROTATION_WARPS,
        num_stages=tile.stages,
    )
    if fused_inputs is None:
        merge_splits(
            partials, paging.position_T, out_TC, split_tokens=SPLIT_TOKENS, warps=1, kind=kind
        )


@triton.jit
def _split_rows(
    k_ptr,
    v_ptr,
    tables_ptr,
    split,
    last,
    kv_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """(keys, values) of a split's positions up to `last`; zeros after it."""
    at = split * SPLIT + tl.arange(0, SPLIT)
    is_past = at <= last
    kv = cache_rows(tables_ptr, at, is_past, kv_head, KV_HEADS, BLOCK_TOKENS)
    kv = kv[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    k = tl.load(k_ptr + kv, mask=is_past[:, None], other=0.0)
    v = tl.load(v_ptr + kv, mask=is_past[:, None], other=0.0)
    return k, v


@triton.jit
def split_result(
    q, k, v, ones, at, position, scale, MASKED: tl.constexpr, WINDOW: tl.constexpr = 0
):
    """(maximum score, sum of weights, unnormalised values) of the rows `q` over a split, whose keys
    are at the positions `at`. Without MASKED, every row sees every key. With WINDOW, a row sees no
    more than so many positions, its own included.

    A row's sum is a dot product with ones, because the order of a row-wise sum would depend on the
    shape of the tile.
    """
    scores = tl.dot(q, k.T)
    if MASKED:
        is_seen = at[None, :] <= position[:, None]
        if WINDOW > 0:
            is_seen &= at[None, :] > position[:, None] - WINDOW
        scores = tl.where(is_seen, scores, float("-inf"))
    maximum = tl.max(scores, axis=1) * scale
    base = tl.where(maximum > float("-inf"), maximum, 0.0)
    against = tl.broadcast_to(-base[:, None], scores.shape)
    p = tl.exp2(tl.fma(scores, tl.full(scores.shape, scale, tl.float32), against)).to(q.dtype)
    return maximum, tl.max(tl.dot(p, ones), axis=1), tl.dot(p, v)


@triton.jit(do_not_specialize=["part_stride", "table_width", "splits_max", "spans_max"])
def _attend_splits(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    sequence_ptr,
    tables_ptr,
    tiles_ptr,
    values_ptr,
    maximum_ptr,
    sum_ptr,
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    bias_ptr,
    scales_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    clip,
    span_values_ptr,
    span_maximum_ptr,
    span_sum_ptr,
    arrivals_ptr,
    sinks_ptr,
    out_ptr,
    scale,
    part_stride,
    table_width,
    splits_max,
    spans_max,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    TILED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    BIASED: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    """Computes each split by itself, so it does not matter which program does it.

    With PARTS, the program of a row's last split stores the new key and value
    and uses them from its registers, since no other program reads them; then splits are merged.
    The rows of the next split are loaded while the current one, or the queries, are computed.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, HEAD_DIM)
    n = tl.arange(0, SPLIT)
    first = tl.load(tiles_ptr + 2 * tile) if TILED else tile
    count = tl.load(tiles_ptr + 2 * tile + 1) if TILED else 1
    row = first + r // GROUP
    is_row = (r // GROUP < count) & (r % GROUP < HEADS // KV_HEADS)
    head = kv_head * (HEADS // KV_HEADS) + r % GROUP
    position = tl.load(position_ptr + row, mask=is_row, other=-1)
    sequence = tl.load(sequence_ptr + first)
    last = tl.max(position, axis=0)
    begin = 0
    if WINDOW > 0:
        begin = first_split_of(tl.load(position_ptr + first), SPLIT, WINDOW)
    first_split = begin + tl.program_id(2)
    if (last >= 0) & (first_split <= last // SPLIT):
        own_tables_ptr = tables_ptr + sequence * table_width
        k, v = _split_rows(
            k_ptr,
            v_ptr,
            own_tables_ptr,
            first_split,
            last,
            kv_head,
            KV_HEADS,
            HEAD_DIM,
            SPLIT,
            BLOCK_TOKENS,
        )
        head_row = row.to(tl.int64) * HEADS + head
        if PARTS == 0:
            q_rows = q_ptr + head_row[:, None] * HEAD_DIM + d[None, :]
            q = tl.load(q_rows, mask=is_row[:, None], other=0.0)
        else:
            row_ptr = qkv_ptr + first.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
            scale_ptr = scales_ptr + first * 2
            q = rotated_queries(
                row_ptr, q_norm_ptr, bias_ptr, scale_ptr, cos_ptr, sin_ptr, eps, clip, last,
                part_stride, head, is_row, PARTS, ROWS, HEAD_DIM, ROTATED, NORM, BIASED, CLIPPED,
            ).to(q_ptr.dtype.element_ty)  # fmt: skip
            key = rotated_key(
                row_ptr, k_norm_ptr, bias_ptr, scale_ptr, cos_ptr, sin_ptr, eps, clip, last,
                part_stride, kv_head, (HEADS + kv_head) * HEAD_DIM, PARTS, HEAD_DIM, ROTATED, NORM,
                BIASED, CLIPPED,
            )  # fmt: skip
            key = to_cached(key, k_ptr.dtype.element_ty)
            column = (HEADS + KV_HEADS + kv_head) * HEAD_DIM
            value = summed_value(
                row_ptr, bias_ptr, clip, part_stride, column, d, PARTS, HEAD_DIM, BIASED, CLIPPED
            )
            value = to_cached(value, v_ptr.dtype.element_ty)
            if (last // SPLIT - first_split) % tl.num_programs(2) == 0:
                new = cache_row(
                    own_tables_ptr, 0, last, kv_head, table_width, KV_HEADS, BLOCK_TOKENS
                )
                tl.store(k_ptr + new * HEAD_DIM + d, key)
                tl.store(v_ptr + new * HEAD_DIM + d, value)
            key, value = key.to(q.dtype), value.to(q.dtype)
        ones = tl.full([SPLIT, 16], 1.0, dtype=q.dtype)
        for split in range(first_split, last // SPLIT + 1, tl.num_programs(2)):
            at = split * SPLIT + n
            k, v = k.to(q.dtype), v.to(q.dtype)
            if PARTS > 0:
                is_new = (at == last)[:, None]
                k = tl.where(is_new, key[None, :], k)
                v = tl.where(is_new, value[None, :], v)
            peak, sums, values = split_result(q, k, v, ones, at, position, scale, True, WINDOW)
            out = head_row * splits_max + split
            store_partials(
                values_ptr, maximum_ptr, sum_ptr, out, values, peak, sums, is_row, HEAD_DIM
            )
            if PARTS > 0:
                merge_after(
                    split, begin, last // SPLIT + 1, first.to(tl.int64) * KV_HEADS + kv_head,
                    values_ptr, maximum_ptr, sum_ptr, span_values_ptr, span_maximum_ptr,
                    span_sum_ptr, arrivals_ptr, sinks_ptr, out_ptr, splits_max, spans_max,
                    HEADS // KV_HEADS, GROUP, HEAD_DIM, SPAN, HEADS, SINKS,
                )  # fmt: skip
            k, v = _split_rows(
                k_ptr,
                v_ptr,
                own_tables_ptr,
                split + tl.num_programs(2),
                last,
                kv_head,
                KV_HEADS,
                HEAD_DIM,
                SPLIT,
                BLOCK_TOKENS,
            )
    elif (last < 0) & (tl.program_id(2) == 0) & (PARTS > 0):
        nothing = tl.zeros([ROWS, HEAD_DIM], dtype=out_ptr.dtype.element_ty)
        out = (row.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
        tl.store(out_ptr + out, nothing, mask=is_row[:, None])
