"""`y = x wᵀ`, with the inner dimension split into fixed parts whose float32 results are added in
order. For few rows reading `w` once is the bottleneck: the parts are computed side by side, and the
next kernel adds them. For many rows one program computes them one after the other and adds them
itself; the bits are the same."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gpu_worker.cuda.kernels import scaled_linear
from gpu_worker.cuda.weights.scaled_blocks import Matrix, ScaledBlocks

_PARTS = 4
_STEPS_MIN = 2
"""Steps of a part. Of a single one, the compiler would add the product to the sum of the parts
before it in one instruction, and the sum would have other bits."""
PARTS_ROWS_MAX = 255
"""For more rows there are enough programs without a split: see `linear_whole`."""
_TILES_ABREAST = 8
"""Tiles of rows that take turns at the same columns, so that both stay in the card's cache."""


class LinearTile(NamedTuple):
    """Launch parameters. None of them changes a bit of the result."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _tile_for(num_rows: int) -> LinearTile:
    """The fastest as measured. Up to 16 rows, more programs are faster; for more than 32, taller
    tiles are, on two warps: with four the compiler would choose another instruction."""
    if num_rows <= 16:
        return LinearTile(rows=16, columns=32, depth=128, warps=4, stages=3)
    if num_rows <= 32:
        return LinearTile(rows=32, columns=64, depth=128, warps=4, stages=3)
    return LinearTile(rows=64, columns=64, depth=64, warps=2, stages=3)


_WHOLE_TILES = (
    LinearTile(rows=128, columns=256, depth=64, warps=8, stages=3),
    LinearTile(rows=128, columns=128, depth=64, warps=8, stages=4),
    LinearTile(rows=64, columns=128, depth=64, warps=4, stages=4),
)
_PROGRAMS_ENOUGH = 128
"""About one for each processor of a large card."""


def _whole_tile_for(num_rows: int, columns: int) -> LinearTile:
    """The largest that occupies the card, as fewer bytes are read for larger ones."""
    for tile in _WHOLE_TILES:
        if (
            triton.cdiv(num_rows, tile.rows) * triton.cdiv(columns, tile.columns)
            >= _PROGRAMS_ENOUGH
        ):
            return tile
    return _WHOLE_TILES[-1]


def num_parts(inner: int) -> int:
    """The number of parts follows from the model alone, because it changes the bits of the
    result."""
    return _PARTS if inner % (_PARTS * _STEPS_MIN * 16) == 0 else 1


def linear_parts(
    x_TK: torch.Tensor,
    w_NK: Matrix,
    out_PTN: torch.Tensor,
    *,
    tile: LinearTile | None = None,
) -> None:
    """Part p of `out_PTN` (float32) covers the p-th of P equal ranges of the inner dimension.
    Scaled weights have tiles of their own."""
    if isinstance(w_NK, ScaledBlocks):
        scaled_linear.linear_parts(x_TK, w_NK, out_PTN)
        return
    num_rows, inner = x_TK.shape
    parts, _, columns = out_PTN.shape
    tile = tile or _tile_for(num_rows)
    part = inner // parts
    depth = math.gcd(tile.depth, part)
    assert inner % parts == 0, "parts must be equal"
    assert depth >= 16, "a part must be a multiple of 16"
    grid = (triton.cdiv(columns, tile.columns), parts, triton.cdiv(num_rows, tile.rows))
    _linear_parts[grid](
        x_TK,
        w_NK,
        out_PTN,
        num_rows,
        INNER=inner,
        COLUMNS=columns,
        PART=part,
        BLOCK_T=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def linear_whole(
    x_TK: torch.Tensor,
    w_NK: Matrix,
    out_TN: torch.Tensor,
    *,
    parts: int,
    tile: LinearTile | None = None,
) -> None:
    """`out_TN` (float32) is the sum of what `linear_parts` computes in so many parts."""
    if isinstance(w_NK, ScaledBlocks):
        scaled_linear.linear_whole(x_TK, w_NK, out_TN, parts=parts)
        return
    num_rows, inner = x_TK.shape
    columns = out_TN.shape[1]
    tile = tile or _whole_tile_for(num_rows, columns)
    steps_min = _STEPS_MIN if parts > 1 else 1
    assert inner % (parts * steps_min * 16) == 0, "parts must be equal, and multiples of 32"
    depth = math.gcd(tile.depth, inner // parts // steps_min)
    grid = (triton.cdiv(columns, tile.columns) * triton.cdiv(num_rows, tile.rows),)
    _linear_whole[grid](
        TensorDescriptor.from_tensor(x_TK, [tile.rows, depth]),
        TensorDescriptor.from_tensor(w_NK, [tile.columns, depth]),
        out_TN,
        num_rows,
        INNER=inner,
        COLUMNS=columns,
        STEPS=inner // parts // depth,
        BLOCK_T=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=depth,
        ABREAST=_TILES_ABREAST,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _linear_parts(
    x_ptr,
    w_ptr,
    out_ptr,
    num_rows,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = part * PART + tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + n[:, None] * INNER + k[None, :]
    x_ptrs = x_ptr + t[:, None] * INNER + k[None, :]
    is_row = t[:, None] < num_rows
    is_column = n[:, None] < COLUMNS
    acc = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for start in range(0, PART, BLOCK_K):
        x = tl.load(x_ptrs + start, mask=is_row, other=0.0)
        if COLUMNS % BLOCK_N == 0:
            w = tl.load(w_ptrs + start)
        else:
            w = tl.load(w_ptrs + start, mask=is_column, other=0.0)
        acc = tl.dot(x, w.T, acc)
    out = out_ptr + (part * num_rows + t[:, None]).to(tl.int64) * COLUMNS + n[None, :]
    tl.store(out, acc, mask=is_row & (n[None, :] < COLUMNS))


@triton.jit(do_not_specialize=["num_rows"])
def _linear_whole(
    x_desc,
    w_desc,
    out_ptr,
    num_rows,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ABREAST: tl.constexpr,
):
    """A part is STEPS steps. The card's copy engine fills tiles beyond the last row or column with
    zeros, and leaves the registers to two tiles of sums."""
    per_band = ABREAST * tl.cdiv(COLUMNS, BLOCK_N)
    first = tl.program_id(0) // per_band * ABREAST
    height = tl.minimum(tl.cdiv(num_rows, BLOCK_T) - first, ABREAST)
    in_band = tl.program_id(0) % per_band
    first_row = (first + in_band % height) * BLOCK_T
    first_column = in_band // height * BLOCK_N
    part = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for step in range(INNER // BLOCK_K):
        x = x_desc.load([first_row, step * BLOCK_K])
        w = w_desc.load([first_column, step * BLOCK_K])
        part = tl.dot(x, w.T, part)
        if step % STEPS == STEPS - 1:
            total += part
            part = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    t = first_row + tl.arange(0, BLOCK_T)
    n = first_column + tl.arange(0, BLOCK_N)
    out = out_ptr + t[:, None].to(tl.int64) * COLUMNS + n[None, :]
    tl.store(out, total, mask=(t[:, None] < num_rows) & (n[None, :] < COLUMNS))
