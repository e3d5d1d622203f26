"""Applies the experts in a rank's slots to their rows: gate and up with the activation, then down.
Each weight is read once per tile of rows, so at decode once per step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels import mxfp4_experts, scaled_experts
from gpu_worker.cuda.kernels.activation import SILU_GATED, Epilogue, gated, with_bias
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
from gpu_worker.cuda.kernels.tall_experts import TALL_ROWS, down_tall, gate_up_tall
from gpu_worker.cuda.weights.mxfp4_matrix import ExpertMatrix, Mxfp4Matrix
from gpu_worker.cuda.weights.scaled_blocks import ScaledBlocks

__all__ = ["ExpertTile", "FusedChoice", "Rows", "dense_mlp_tile", "down", "gate_up"]


class ExpertTile(NamedTuple):
    """Launch parameters. None of them changes a bit of the result."""

    columns: int
    depth: int
    warps: int
    stages: int


# The fastest as measured: few experts need more programs, many need longer reads.
_GATE_UP_UNGROUPED = ExpertTile(columns=32, depth=128, warps=4, stages=3)
_GATE_UP_GROUPED = ExpertTile(columns=32, depth=256, warps=4, stages=4)
_DOWN_UNGROUPED = ExpertTile(columns=64, depth=128, warps=4, stages=3)
_DOWN_GROUPED = ExpertTile(columns=64, depth=256, warps=4, stages=3)
_GATE_UP_MANY = ExpertTile(columns=64, depth=64, warps=4, stages=4)
_DOWN_MANY = ExpertTile(columns=128, depth=64, warps=4, stages=4)
_MANY_ROWS = 64  # of a tile
_SMALL_INNER = 4096  # up to this size, 32 columns per program leave parts of a large card idle


def dense_mlp_tile(rows: int, inner: int) -> ExpertTile:
    """The tile for one MLP that all rows go through, in tiles of `rows` rows. A small MLP is split
    into more programs. Tiles of 64 rows and more run on two warps, because with four the compiler
    would choose another instruction."""
    if rows >= 64:
        return ExpertTile(columns=32, depth=64, warps=2, stages=3)
    return ExpertTile(columns=16 if inner <= _SMALL_INNER else 32, depth=256, warps=4, stages=4)


def gate_up(
    x: torch.Tensor,
    w_gate_up_SJH: ExpertMatrix,
    rows: Rows,
    inner_NI: torch.Tensor,
    *,
    chosen: FusedChoice | None = None,
    epilogue: Epilogue = SILU_GATED,
    tile: ExpertTile | None = None,
) -> None:
    """`inner = silu(gate x) · (up x)`, if `epilogue` says nothing else. `w_gate_up_SJH` holds gate,
    then up. Rows of `x` may lie apart, but not with tall tiles.

    If each pair is its own tile, `chosen` lets this kernel choose the slots itself. The choice has
    the same bits as that of `routing.choose_slots`, and saves its launch. Weights that are codes
    have tiles of their own.
    """
    if isinstance(w_gate_up_SJH, Mxfp4Matrix):
        mxfp4_experts.gate_up(x, w_gate_up_SJH, rows, inner_NI, epilogue, chosen=chosen)
        return
    if isinstance(w_gate_up_SJH, ScaledBlocks):
        assert epilogue == SILU_GATED, "scaled experts have no other epilogue"
        scaled_experts.gate_up(x, w_gate_up_SJH, rows, inner_NI, chosen=chosen)
        return
    if rows.tiles is not None and rows.tiles.rows == TALL_ROWS and tile is None:
        gate_up_tall(x, w_gate_up_SJH, rows.tiles, inner_NI, epilogue, divisor=_divisor(rows))
        return
    assert chosen is None or rows.tiles is None, "only pairs without tiles choose their slots here"
    _, double_inner, hidden = w_gate_up_SJH.shape
    inner = double_inner // 2
    tile = tile or _tile_for(rows, _GATE_UP_UNGROUPED, _GATE_UP_GROUPED, _GATE_UP_MANY)
    columns, depth = _fit(tile.columns, inner), _fit(tile.depth, hidden)
    _gate_up[(inner // columns, tiles_at_once(rows, inner // columns))](
        x,
        w_gate_up_SJH,
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
        **_launch_options(rows, columns, depth, tile),
    )


def down(
    inner_NI: torch.Tensor,
    w_down_SHI: ExpertMatrix,
    rows: Rows,
    y_NH: torch.Tensor,
    *,
    epilogue: Epilogue = SILU_GATED,
    tile: ExpertTile | None = None,
) -> None:
    """`y = w_down inner`, per row in the weights of its slot, plus the bias of `epilogue`. Rows of
    `y_NH` may lie apart, but not with tall tiles."""
    if isinstance(w_down_SHI, Mxfp4Matrix):
        mxfp4_experts.down(inner_NI, w_down_SHI, rows, y_NH, epilogue)
        return
    if isinstance(w_down_SHI, ScaledBlocks):
        assert epilogue == SILU_GATED, "scaled experts have no other epilogue"
        scaled_experts.down(inner_NI, w_down_SHI, rows, y_NH)
        return
    if rows.tiles is not None and rows.tiles.rows == TALL_ROWS and tile is None:
        down_tall(inner_NI, w_down_SHI, rows.tiles, y_NH, epilogue, padded=rows.padded)
        return
    _, hidden, inner = w_down_SHI.shape
    tile = tile or _tile_for(rows, _DOWN_UNGROUPED, _DOWN_GROUPED, _DOWN_MANY)
    columns, depth = _fit(tile.columns, hidden), _fit(tile.depth, inner)
    _down[(hidden // columns, tiles_at_once(rows, hidden // columns))](
        inner_NI,
        w_down_SHI,
        *row_pointers(rows),
        y_NH,
        inner_NI if epilogue.b_down_SH is None else epilogue.b_down_SH,
        HIDDEN=hidden,
        INNER=inner,
        ROW=y_NH.stride(0),
        BIASED=epilogue.b_down_SH is not None,
        **_launch_options(rows, columns, depth, tile),
    )


def _divisor(rows: Rows) -> int:
    """By how much the number of a row of work is divided for that of its input; 0 if it is padded:
    see `Rows`."""
    return 0 if rows.padded else rows.slots_TK.shape[-1]


def _tile_for(
    rows: Rows, ungrouped: ExpertTile, grouped: ExpertTile, many: ExpertTile
) -> ExpertTile:
    if rows.tiles is None:
        return ungrouped
    return many if rows.tiles.rows >= _MANY_ROWS else grouped


def _launch_options(
    rows: Rows, columns: int, depth: int, tile: ExpertTile
) -> dict[str, int | bool]:
    return {
        "BLOCK_T": 16 if rows.tiles is None else rows.tiles.rows,
        "BLOCK_N": columns,
        "BLOCK_K": depth,
        "GROUPED": rows.tiles is not None,
        "PADDED": rows.padded,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _fit(block: int, size: int) -> int:
    """The block, halved until it divides the size. A dot product needs at least 16."""
    block = math.gcd(block, size)
    assert block >= 16, "inner and hidden sizes must be multiples of 16"
    return block


@triton.jit
def _gate_up(
    x_ptr,
    w_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPED: tl.constexpr,
    PADDED: tl.constexpr,
):
    for tile in range(tl.program_id(1), tiles_end(num_tiles_ptr, PADDED), tl.num_programs(1)):
        if EXPERTS > 0:
            slot = choose_slot(
                tile,
                scores_ptr,
                slot_of_ptr,
                position_ptr,
                slots_ptr,
                weights_ptr,
                factor,
                DIVISOR,
                EXPERTS,
                BLOCK_E,
                CHUNK,
                NORMALISE,
            )
            rows, is_row = ungrouped_row(tile, BLOCK_T)
        else:
            slot, rows, is_row = find_rows(
                tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T, GROUPED, PADDED
            )
        if slot >= 0:
            n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            x_rows = rows if PADDED else rows // DIVISOR
            x_ptrs = x_ptr + x_rows[:, None] * ROW + k[None, :]
            gate_ptrs = w_ptr + slot * (2 * INNER * HIDDEN) + n[:, None] * HIDDEN + k[None, :]
            gate = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
            up = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
            for start in range(0, HIDDEN, BLOCK_K):
                x = tl.load(x_ptrs + start, mask=is_row[:, None], other=0.0)
                gate = tl.dot(x, tl.load(gate_ptrs + start).T, gate)
                up = tl.dot(x, tl.load(gate_ptrs + INNER * HIDDEN + start).T, up)
            inner = gated(gate, up, bias_ptr + slot * (2 * INNER), n, INNER, BIASED, CLAMPED)
            out = inner_ptr + rows[:, None] * INNER + n[None, :]
            tl.store(out, inner.to(inner_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _down(
    inner_ptr,
    w_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPED: tl.constexpr,
    PADDED: tl.constexpr,
):
    for tile in range(tl.program_id(1), tiles_end(num_tiles_ptr, PADDED), tl.num_programs(1)):
        slot, rows, is_row = find_rows(
            tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T, GROUPED, PADDED
        )
        if slot >= 0:
            n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            inner_ptrs = inner_ptr + rows[:, None] * INNER + k[None, :]
            w_ptrs = w_ptr + slot * (HIDDEN * INNER) + n[:, None] * INNER + k[None, :]
            y = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
            for start in range(0, INNER, BLOCK_K):
                inner = tl.load(inner_ptrs + start, mask=is_row[:, None], other=0.0)
                y = tl.dot(inner, tl.load(w_ptrs + start).T, y)
            y = with_bias(y, bias_ptr + slot * HIDDEN, n, BIASED)
            out = y_ptr + rows[:, None] * ROW + n[None, :]
            tl.store(out, y.to(y_ptr.dtype.element_ty), mask=is_row[:, None])
