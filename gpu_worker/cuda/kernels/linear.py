"""`y = x wᵀ` for few rows. Reading `w` once is the bottleneck. The inner dimension is split into
fixed parts, and the next kernel adds their float32 results in order."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

_PARTS = 4


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


def num_parts(inner: int) -> int:
    """The number of parts follows from the model alone, because it changes the bits of the
    result."""
    return _PARTS if inner % (_PARTS * 16) == 0 else 1


def linear_parts(
    x_TK: torch.Tensor,
    w_NK: torch.Tensor,
    out_PTN: torch.Tensor,
    *,
    tile: LinearTile | None = None,
) -> None:
    """Part p of `out_PTN` (float32) covers the p-th of P equal ranges of the inner dimension."""
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
