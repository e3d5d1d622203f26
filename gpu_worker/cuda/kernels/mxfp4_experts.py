"""`experts` for weights in MXFP4. They are read as they are, a quarter of the bytes of bfloat16,
and widened in registers, exactly: a row has the bits that it has with the widened weights.

The weights are the first operand of every product, as in `scaled_experts`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.activation import Epilogue, gated, with_bias
from gpu_worker.cuda.kernels.expert_rows import (
    FusedChoice,
    Rows,
    choice_arguments,
    choice_sizes,
    choose_slot,
    find_rows,
    row_pointers,
    tiles_at_once,
    tiles_end,
    ungrouped_row,
)
from gpu_worker.cuda.kernels.mxfp4_operands import widen_words
from gpu_worker.cuda.kernels.scaled_operands import load_rows
from gpu_worker.cuda.weights.mxfp4_matrix import Mxfp4Matrix


class Mxfp4Tile(NamedTuple):
    """Launch parameters. `columns` are the rows of the weights that a program multiplies at once,
    64 for each four warps: those of gate and up count both. `depth` is a multiple of 128. None of
    them changes a bit."""

    columns: int
    depth: int
    warps: int
    stages: int


_UNGROUPED = Mxfp4Tile(columns=64, depth=128, warps=4, stages=4)
_GROUPED = Mxfp4Tile(columns=64, depth=128, warps=4, stages=3)
_TALL = Mxfp4Tile(columns=64, depth=128, warps=4, stages=3)
_TALL_ROWS = 128
"""A tile of so many rows that is at most half full is computed as one of half that height."""


def gate_up(
    x: torch.Tensor,
    w_gate_up: Mxfp4Matrix,
    rows: Rows,
    inner_NI: torch.Tensor,
    epilogue: Epilogue,
    *,
    chosen: FusedChoice | None = None,
    tile: Mxfp4Tile | None = None,
) -> None:
    """As `experts.gate_up`. `w_gate_up` is `[S, 2I, H]`, eight rows of gate and the same eight of
    up in turn. I and H are multiples of 32."""
    assert chosen is None or rows.tiles is None, "only pairs without tiles choose their slots here"
    _, double_inner, hidden = w_gate_up.shape
    inner = double_inner // 2
    tile = tile or _tile_for(rows)
    columns = 2 * math.gcd(tile.columns // 2, inner)
    programs = double_inner // columns
    _gate_up[(programs, tiles_at_once(rows, programs))](
        x,
        w_gate_up.codes.view(torch.int32),
        w_gate_up.scales.view(torch.int32),
        *row_pointers(rows),
        inner_NI,
        *choice_arguments(chosen, rows),
        x if epilogue.b_gate_up_SJ is None else epilogue.b_gate_up_SJ,
        HIDDEN=hidden,
        INNER=inner,
        ROW=x.stride(0),
        DIVISOR=rows.slots_TK.shape[-1],
        **choice_sizes(chosen),
        BIASED=epilogue.b_gate_up_SJ is not None,
        CLAMPED=epilogue.clamped,
        **_launch_options(rows, columns, tile, x),
    )


def down(
    inner_NI: torch.Tensor,
    w_down: Mxfp4Matrix,
    rows: Rows,
    y_NH: torch.Tensor,
    epilogue: Epilogue,
    *,
    tile: Mxfp4Tile | None = None,
) -> None:
    """As `experts.down`. `w_down` is `[S, H, I]`."""
    _, hidden, inner = w_down.shape
    tile = tile or _tile_for(rows)
    programs = triton.cdiv(hidden, tile.columns)
    _down[(programs, tiles_at_once(rows, programs))](
        inner_NI,
        w_down.codes.view(torch.int32),
        w_down.scales.view(torch.int32),
        *row_pointers(rows),
        y_NH,
        inner_NI if epilogue.b_down_SH is None else epilogue.b_down_SH,
        HIDDEN=hidden,
        INNER=inner,
        ROW=y_NH.stride(0),
        BIASED=epilogue.b_down_SH is not None,
        **_launch_options(rows, tile.columns, tile, inner_NI),
    )


def _tile_for(rows: Rows) -> Mxfp4Tile:
    if rows.tiles is None:
        return _UNGROUPED
    return _TALL if rows.tiles.rows >= _TALL_ROWS else _GROUPED


def _launch_options(
    rows: Rows, columns: int, tile: Mxfp4Tile, x: torch.Tensor
) -> dict[str, int | bool]:
    block_rows = 16 if rows.tiles is None else rows.tiles.rows
    return {
        "BLOCK_T": block_rows,
        "BLOCK_C": columns,
        "BLOCK_K": tile.depth,
        "GROUPED": rows.tiles is not None,
        "PADDED": rows.padded,
        "HALVED": block_rows >= _TALL_ROWS,
        "BY_CARD": x.dtype == torch.bfloat16 and x.is_cuda,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit
def _gate_up(
    x_ptr,
    w_ptr,
    scales_ptr,
    slots_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    inner_ptr,
    scores_ptr,
    slot_of_ptr,
    position_ptr,
    weights_ptr,
    factor,
    bias_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROW: tl.constexpr,
    DIVISOR: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPED: tl.constexpr,
    PADDED: tl.constexpr,
    HALVED: tl.constexpr,
    BY_CARD: tl.constexpr,
):
    for tile in range(tl.program_id(1), tiles_end(num_tiles_ptr, PADDED), tl.num_programs(1)):
        if EXPERTS > 0:
            slot = choose_slot(
                tile, scores_ptr, slot_of_ptr, position_ptr, slots_ptr, weights_ptr, factor,
                DIVISOR, EXPERTS, BLOCK_E, CHUNK, NORMALISE,
            )  # fmt: skip
            rows, is_row = ungrouped_row(tile, BLOCK_T)
        else:
            slot, rows, is_row = find_rows(
                tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T, GROUPED, PADDED
            )
        if slot >= 0:
            if HALVED and tl.sum(is_row.to(tl.int32), axis=0) <= BLOCK_T // 2:
                _, half, is_half = find_rows(
                    tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T // 2, GROUPED,
                    PADDED,
                )  # fmt: skip
                _gate_up_rows(
                    x_ptr, w_ptr, scales_ptr, inner_ptr, bias_ptr, slot, half, is_half, HIDDEN,
                    INNER, ROW, 1 if PADDED else DIVISOR, BIASED, CLAMPED, BLOCK_C, BLOCK_K,
                    BY_CARD,
                )  # fmt: skip
            else:
                _gate_up_rows(
                    x_ptr, w_ptr, scales_ptr, inner_ptr, bias_ptr, slot, rows, is_row, HIDDEN,
                    INNER, ROW, 1 if PADDED else DIVISOR, BIASED, CLAMPED, BLOCK_C, BLOCK_K,
                    BY_CARD,
                )  # fmt: skip


@triton.jit
def _gate_up_rows(
    x_ptr,
    w_ptr,
    scales_ptr,
    inner_ptr,
    bias_ptr,
    slot,
    rows,
    is_row,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROW: tl.constexpr,
    DIVISOR: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_CARD: tl.constexpr,
):
    COLUMNS: tl.constexpr = BLOCK_C // 2
    TURNS: tl.constexpr = BLOCK_C // 16
    first = tl.program_id(0) * BLOCK_C
    sums = _product(
        x_ptr + (rows // DIVISOR)[:, None] * ROW, is_row, w_ptr, scales_ptr, slot, first,
        2 * INNER, HIDDEN, BLOCK_C, BLOCK_K, BY_CARD,
    )  # fmt: skip
    both = tl.reshape(sums, [TURNS, 2, 8, rows.shape[0]])
    gate, up = tl.split(tl.permute(both, [0, 2, 3, 1]))
    gate = tl.reshape(gate, [COLUMNS, rows.shape[0]]).T
    up = tl.reshape(up, [COLUMNS, rows.shape[0]]).T
    n = first // 2 + tl.arange(0, COLUMNS)
    inner = gated(gate, up, bias_ptr + slot * (2 * INNER), n, INNER, BIASED, CLAMPED)
    out = inner_ptr + rows[:, None] * INNER + n[None, :]
    tl.store(out, inner.to(inner_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _down(
    inner_ptr,
    w_ptr,
    scales_ptr,
    slots_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    y_ptr,
    bias_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROW: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPED: tl.constexpr,
    PADDED: tl.constexpr,
    HALVED: tl.constexpr,
    BY_CARD: tl.constexpr,
):
    for tile in range(tl.program_id(1), tiles_end(num_tiles_ptr, PADDED), tl.num_programs(1)):
        slot, rows, is_row = find_rows(
            tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T, GROUPED, PADDED
        )
        if slot >= 0:
            if HALVED and tl.sum(is_row.to(tl.int32), axis=0) <= BLOCK_T // 2:
                _, half, is_half = find_rows(
                    tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T // 2, GROUPED,
                    PADDED,
                )  # fmt: skip
                _down_rows(
                    inner_ptr, w_ptr, scales_ptr, y_ptr, bias_ptr, slot, half, is_half, HIDDEN,
                    INNER, ROW, BIASED, BLOCK_C, BLOCK_K, BY_CARD,
                )  # fmt: skip
            else:
                _down_rows(
                    inner_ptr, w_ptr, scales_ptr, y_ptr, bias_ptr, slot, rows, is_row, HIDDEN,
                    INNER, ROW, BIASED, BLOCK_C, BLOCK_K, BY_CARD,
                )  # fmt: skip


@triton.jit
def _down_rows(
    inner_ptr,
    w_ptr,
    scales_ptr,
    y_ptr,
    bias_ptr,
    slot,
    rows,
    is_row,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROW: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_CARD: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_C
    y = _product(
        inner_ptr + rows[:, None] * INNER, is_row, w_ptr, scales_ptr, slot, first, HIDDEN, INNER,
        BLOCK_C, BLOCK_K, BY_CARD,
    )  # fmt: skip
    n = first + tl.arange(0, BLOCK_C)
    y = with_bias(y.T, bias_ptr + slot * HIDDEN, tl.minimum(n, HIDDEN - 1), BIASED)
    out = y_ptr + rows[:, None] * ROW + n[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & (n[None, :] < HIDDEN))


@triton.jit
def _product(
    x_rows,
    is_row,
    w_ptr,
    scales_ptr,
    slot,
    first,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_CARD: tl.constexpr,
):
    """`[C, T]`, the sums of the slot's rows of weights from `first` on, of ROWS, with the rows at
    `x_rows`, all of them INNER long."""
    ALL_C: tl.constexpr = ROWS % BLOCK_C == 0
    ALL_K: tl.constexpr = INNER % BLOCK_K == 0
    WORDS: tl.constexpr = INNER // 8
    SCALES: tl.constexpr = (INNER + 127) // 128
    DEEP: tl.constexpr = BLOCK_K // 128
    n = first + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_K // 8)
    deep = tl.arange(0, DEEP)
    x_ptrs = x_rows + k[None, :]
    w_ptrs = w_ptr + slot * (ROWS * WORDS) + n[:, None] * WORDS + word[None, :]
    scale_ptrs = scales_ptr + slot * (SCALES * ROWS) + n[:, None] + deep[None, :] * ROWS
    sums = tl.zeros([BLOCK_C, x_rows.shape[0]], dtype=tl.float32)
    for start in range(0, INNER, BLOCK_K):
        x = load_rows(x_ptrs + start, is_row, INNER - start, False, ALL_K)
        w = load_rows(w_ptrs + start // 8, n < ROWS, (INNER - start) // 8, ALL_C, ALL_K)
        scales = load_rows(
            scale_ptrs + start // 128 * ROWS, n < ROWS, SCALES - start // 128, ALL_C, DEEP == 1
        )
        sums = tl.dot(widen_words(w, scales, x, BY_CARD), x.T, sums)
    return sums
