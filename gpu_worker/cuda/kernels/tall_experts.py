"""`experts` for slots with many rows: tiles so tall and wide that the matrix units, not reads, set
the pace. The bits are the same."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gpu_worker.cuda.kernels.activation import Epilogue, gated, with_bias
from gpu_worker.cuda.kernels.routing import SlotTiles

TALL_ROWS = 128
"""Rows of a tile. One that is at most half full is computed as a tile of half that height."""
_WARPS = 8
_DEPTH = 64
_GATE_UP_COLUMNS = 128  # of each of the two
_DOWN_COLUMNS = 256
_STAGES = 4


def gate_up_tall(
    x: torch.Tensor,
    w_gate_up_SJH: torch.Tensor,
    tiles: SlotTiles,
    inner_NI: torch.Tensor,
    epilogue: Epilogue,
    *,
    divisor: int,
) -> None:
    """As `experts.gate_up`. The input of row n of the work is row `n // divisor`. A divisor of 0
    means that rows are padded: see `experts.Rows`."""
    _, double_inner, hidden = w_gate_up_SJH.shape
    inner = double_inner // 2
    columns, depth = math.gcd(_GATE_UP_COLUMNS, inner), math.gcd(_DEPTH, hidden)
    _gate_up_tall[(inner // columns, tiles.tiles_C3.shape[0])](
        x,
        TensorDescriptor.from_tensor(w_gate_up_SJH.view(-1, hidden), [columns, depth]),
        tiles.order_N,
        tiles.tiles_C3,
        tiles.num_tiles_1,
        inner_NI,
        x if epilogue.b_gate_up_SJ is None else epilogue.b_gate_up_SJ,
        HIDDEN=hidden,
        INNER=inner,
        DIVISOR=divisor,
        BIASED=epilogue.b_gate_up_SJ is not None,
        CLAMPED=epilogue.clamped,
        BLOCK_T=tiles.rows,
        BLOCK_N=columns,
        BLOCK_K=depth,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )


def down_tall(
    inner_NI: torch.Tensor,
    w_down_SHI: torch.Tensor,
    tiles: SlotTiles,
    y_NH: torch.Tensor,
    epilogue: Epilogue,
    *,
    padded: bool,
) -> None:
    """As `experts.down`."""
    _, hidden, inner = w_down_SHI.shape
    columns, depth = math.gcd(_DOWN_COLUMNS, hidden), math.gcd(_DEPTH, inner)
    _down_tall[(hidden // columns, tiles.tiles_C3.shape[0])](
        inner_NI,
        TensorDescriptor.from_tensor(w_down_SHI.view(-1, inner), [columns, depth]),
        tiles.order_N,
        tiles.tiles_C3,
        tiles.num_tiles_1,
        y_NH,
        inner_NI if epilogue.b_down_SH is None else epilogue.b_down_SH,
        HIDDEN=hidden,
        INNER=inner,
        PADDED=padded,
        BIASED=epilogue.b_down_SH is not None,
        BLOCK_T=tiles.rows,
        BLOCK_N=columns,
        BLOCK_K=depth,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )


@triton.jit
def _rows_of(order_ptr, first, count, PADDED: tl.constexpr, BLOCK_T: tl.constexpr):
    """(rows of the work, mask) of a tile."""
    t = tl.arange(0, BLOCK_T)
    is_row = t < count
    if PADDED:
        rows = (first + t).to(tl.int64)
    else:
        rows = tl.load(order_ptr + first + t, mask=is_row, other=0).to(tl.int64)
    return rows, is_row


@triton.jit
def _gate_up_tall(
    x_ptr,
    w_desc,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    inner_ptr,
    bias_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    DIVISOR: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(1) * 3
    if tl.program_id(1) < tl.load(num_tiles_ptr):
        slot = tl.load(tile_ptr)
        first = tl.load(tile_ptr + 1)
        count = tl.load(tile_ptr + 2)
        gate_row = slot * (2 * INNER) + tl.program_id(0) * BLOCK_N
        if count > BLOCK_T // 2:
            _gate_up_rows(
                x_ptr, w_desc, order_ptr, inner_ptr, bias_ptr, slot, gate_row, first, count, HIDDEN,
                INNER, DIVISOR, BIASED, CLAMPED, BLOCK_T, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _gate_up_rows(
                x_ptr, w_desc, order_ptr, inner_ptr, bias_ptr, slot, gate_row, first, count, HIDDEN,
                INNER, DIVISOR, BIASED, CLAMPED, BLOCK_T // 2, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _gate_up_rows(
    x_ptr,
    w_desc,
    order_ptr,
    inner_ptr,
    bias_ptr,
    slot,
    gate_row,
    first,
    count,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    DIVISOR: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, is_row = _rows_of(order_ptr, first, count, DIVISOR == 0, BLOCK_T)
    x_rows = rows if DIVISOR == 0 else rows // DIVISOR
    x_ptrs = x_ptr + x_rows[:, None] * HIDDEN + tl.arange(0, BLOCK_K)[None, :]
    gate = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        x = tl.load(x_ptrs + start, mask=is_row[:, None], other=0.0)
        gate = tl.dot(x, w_desc.load([gate_row, start]).T, gate)
        up = tl.dot(x, w_desc.load([gate_row + INNER, start]).T, up)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = gated(gate, up, bias_ptr + slot * (2 * INNER), n, INNER, BIASED, CLAMPED)
    out = inner_ptr + rows[:, None] * INNER + n[None, :]
    tl.store(out, inner.to(inner_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _down_tall(
    inner_ptr,
    w_desc,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    y_ptr,
    bias_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(1) * 3
    if tl.program_id(1) < tl.load(num_tiles_ptr):
        slot = tl.load(tile_ptr)
        first = tl.load(tile_ptr + 1)
        count = tl.load(tile_ptr + 2)
        w_row = slot * HIDDEN + tl.program_id(0) * BLOCK_N
        if count > BLOCK_T // 2:
            _down_rows(
                inner_ptr, w_desc, order_ptr, y_ptr, bias_ptr, slot, w_row, first, count, HIDDEN,
                INNER, PADDED, BIASED, BLOCK_T, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _down_rows(
                inner_ptr, w_desc, order_ptr, y_ptr, bias_ptr, slot, w_row, first, count, HIDDEN,
                INNER, PADDED, BIASED, BLOCK_T // 2, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _down_rows(
    inner_ptr,
    w_desc,
    order_ptr,
    y_ptr,
    bias_ptr,
    slot,
    w_row,
    first,
    count,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, is_row = _rows_of(order_ptr, first, count, PADDED, BLOCK_T)
    inner_ptrs = inner_ptr + rows[:, None] * INNER + tl.arange(0, BLOCK_K)[None, :]
    y = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for start in range(0, INNER, BLOCK_K):
        inner = tl.load(inner_ptrs + start, mask=is_row[:, None], other=0.0)
        y = tl.dot(inner, w_desc.load([w_row, start]).T, y)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = with_bias(y, bias_ptr + slot * HIDDEN, n, BIASED)
    out = y_ptr + rows[:, None] * HIDDEN + n[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=is_row[:, None])
