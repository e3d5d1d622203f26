"""Grouped-query attention of steps with prefill: a program walks the splits of a tile of tokens and
merges them in registers, so that no split's result goes through memory.

It computes and merges each split exactly as `attention` and `splits` do, in the same order: rising
within a span, then span by span. So a row has the same bits here as there. If there are enough
tiles for a card, one program does all spans of a tile. What it has merged so far waits in memory
while the next span is computed: registers hold one span and one split. In smaller steps each span
has a program of its own, and a second kernel merges them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.attention import LOG2_E, SPLIT_TOKENS, split_result
from gpu_worker.cuda.kernels.paging import Paging, cache_rows
from gpu_worker.cuda.kernels.splits import (
    SEES_ALL,
    SPAN,
    Partials,
    WindowAndSinks,
    add_partial,
    first_split_of,
    merge_spans,
    store_normalised,
    store_partials,
    with_sink,
)


class ChunkTile(NamedTuple):
    """Launch parameters. None of them changes a bit of the result."""

    warps: int
    stages: int


CHUNK_TILE = ChunkTile(warps=4, stages=2)
SPANS_APART_ROWS_MAX = 512
"""With more rows there are tiles enough for a card; with fewer, long contexts need more."""
_SPANS_AT_ONCE = 8
_ROWS = 64  # of a tile: with two such programs at a time, one computes while the other waits


def chunk_tile_tokens(heads: int, kv_heads: int) -> int:
    """Tokens of a tile: each of them is a row for every query head that shares a KV head."""
    return max(1, _ROWS // int(triton.next_power_of_2(heads // kv_heads)))


def attend_chunks(
    q_TQD: torch.Tensor,
    k_BJUD: torch.Tensor,
    v_BJUD: torch.Tensor,
    paging: Paging,
    merged_TQD: torch.Tensor,
    out_TC: torch.Tensor,
    *,
    kind: WindowAndSinks = SEES_ALL,
    spans: Partials | None = None,
    tile: ChunkTile = CHUNK_TILE,
) -> None:
    """Writes the heads of the tiles' tokens side by side to `out_TC`. All keys and values are
    already in the cache, and `q_TQD` holds the rotated queries. Scratch is `merged_TQD` (float32),
    or `spans` for the results of spans that are computed side by side."""
    _, heads, head_dim = q_TQD.shape
    _, num_kv_heads, block_tokens, _ = k_BJUD.shape
    assert paging.tiles_C2 is not None, "chunks come in tiles"
    group = triton.next_power_of_2(heads // num_kv_heads)
    num_tiles = paging.tiles_C2.shape[0]
    room = Partials(merged_TQD, merged_TQD, merged_TQD) if spans is None else spans
    spans_max = 1 if spans is None else spans.maximum_TQX.shape[2]
    _attend_chunks[(num_kv_heads, num_tiles, min(spans_max, _SPANS_AT_ONCE))](
        q_TQD,
        k_BJUD,
        v_BJUD,
        paging.position_T,
        paging.sequence_T,
        paging.tables_SB,
        paging.tiles_C2,
        *room,
        kind.sinks_or(out_TC),
        out_TC,
        head_dim**-0.5 * LOG2_E,
        paging.tables_SB.shape[1],
        spans_max,
        HEADS=heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        GROUP=group,
        ROWS=max(16, group * paging.tile_tokens),
        SPLIT=SPLIT_TOKENS,
        BLOCK_TOKENS=block_tokens,
        SPAN=SPAN,
        APART=spans is not None,
        **kind.form(),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,  # `splits` adds what was stored: a product is rounded before a sum
    )
    if spans is not None:
        merge_spans(spans, paging.position_T, out_TC, split_tokens=SPLIT_TOKENS, kind=kind)


@triton.jit(do_not_specialize=["table_width", "spans_max"])
def _attend_chunks(
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
    sinks_ptr,
    out_ptr,
    scale,
    table_width,
    spans_max,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    APART: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The last tiles of a chunk see most, so they start first."""
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, HEAD_DIM)
    n = tl.arange(0, SPLIT)
    first = tl.load(tiles_ptr + 2 * tile)
    count = tl.load(tiles_ptr + 2 * tile + 1)
    row = first + r // GROUP
    is_row = (r // GROUP < count) & (r % GROUP < HEADS // KV_HEADS)
    position = tl.load(position_ptr + row, mask=is_row, other=-1)
    last = tl.max(position, axis=0)
    if last >= 0:
        table_ptr = tables_ptr + tl.load(sequence_ptr + first) * table_width
        head = row.to(tl.int64) * HEADS + kv_head * (HEADS // KV_HEADS) + r % GROUP
        at_head = head[:, None] * HEAD_DIM + d[None, :]
        q = tl.load(q_ptr + at_head, mask=is_row[:, None], other=0.0)
        ones = tl.full([SPLIT, 16], 1.0, dtype=q.dtype)
        num_splits = last // SPLIT + 1
        begin = 0
        if WINDOW > 0:
            begin = first_split_of(tl.load(position_ptr + first), SPLIT, WINDOW)
            num_full = 0  # a window has few splits, most of them seen in part
        else:
            num_full = (tl.load(position_ptr + first) + 1) // SPLIT  # that all rows see whole
        begin_span = begin // SPAN * SPAN
        peak, total, values = _nothing(ROWS, HEAD_DIM)
        merged_peak, merged_total = peak, total
        first_start = begin_span + tl.program_id(2) * SPAN
        for start in range(first_start, num_splits, tl.num_programs(2) * SPAN):
            peak, total, values = _nothing(ROWS, HEAD_DIM)
            end = tl.minimum(start + SPAN, num_splits)
            for split in range(start, tl.minimum(end, num_full)):
                at = split * SPLIT + n
                kv = cache_rows(table_ptr, at, at >= 0, kv_head, KV_HEADS, BLOCK_TOKENS)
                kv = kv[:, None] * HEAD_DIM + d[None, :]
                k = tl.load(k_ptr + kv).to(q.dtype)
                v = tl.load(v_ptr + kv).to(q.dtype)
                maximum, sums, parts = split_result(q, k, v, ones, at, position, scale, False)
                peak, total, values = add_partial(peak, total, values, maximum, sums, parts)
            for split in range(tl.maximum(start, tl.maximum(begin, num_full)), end):
                at = split * SPLIT + n
                is_past = at <= last
                kv = cache_rows(table_ptr, at, is_past, kv_head, KV_HEADS, BLOCK_TOKENS)
                kv = kv[:, None] * HEAD_DIM + d[None, :]
                k = tl.load(k_ptr + kv, mask=is_past[:, None], other=0.0)
                v = tl.load(v_ptr + kv, mask=is_past[:, None], other=0.0)
                k, v = k.to(q.dtype), v.to(q.dtype)
                maximum, sums, parts = split_result(
                    q, k, v, ones, at, position, scale, True, WINDOW
                )
                peak, total, values = add_partial(peak, total, values, maximum, sums, parts)
            if APART:
                at_span = head * spans_max + start // SPAN
                store_partials(
                    values_ptr,
                    maximum_ptr,
                    sum_ptr,
                    at_span,
                    values,
                    peak,
                    total,
                    is_row,
                    HEAD_DIM,
                )
            else:
                if start > begin_span:
                    former = tl.load(values_ptr + at_head, mask=is_row[:, None], other=0.0)
                    merged_peak, merged_total, values = add_partial(
                        merged_peak, merged_total, former, peak, total, values
                    )
                else:
                    merged_peak, merged_total = peak, total
                if start + SPAN < num_splits:
                    tl.store(values_ptr + at_head, values, mask=is_row[:, None])
                    tl.debug_barrier()  # other threads than those that store may load
        if not APART:
            if SINKS:
                merged_total = with_sink(merged_total, merged_peak, sinks_ptr, head, is_row, HEADS)
            store_normalised(out_ptr, head, values, merged_total, is_row[:, None], HEAD_DIM)


@triton.jit
def _nothing(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(maximum, sum, unnormalised values) before the first split of a span."""
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    return peak, total, tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
