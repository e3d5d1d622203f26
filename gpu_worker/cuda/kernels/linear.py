"""`y = x wᵀ` for few rows: bound by reading `w` once. The inner dimension is cut into fixed parts,
whose fp32 results the next kernel adds in order."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.pdl import (
    after_predecessor,
    await_predecessor,
    launch_options,
    release_successor,
)

PART = 512
"""The length of a part of the inner dimension; shorter where that is not a multiple of it. Part of
the result, unlike the tiles."""

_EARLY_ROWS_MAX = 32


class LinearTile(NamedTuple):
    """None of these changes a bit of the result."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_SHORT = LinearTile(rows=16, columns=32, depth=128, warps=4, stages=4)
_TALL = LinearTile(rows=32, columns=64, depth=64, warps=4, stages=4)


def num_parts(inner: int) -> int:
    return inner // PART if inner % PART == 0 else 1


def linear_parts(
    x_TK: torch.Tensor,
    w_NK: torch.Tensor,
    out_PTN: torch.Tensor,
    *,
    pdl: bool = False,
    tile: LinearTile | None = None,
) -> None:
    """Part p of `out_PTN` (float32) covers the p-th of P equal ranges of the inner dimension."""
    num_rows, inner = x_TK.shape
    parts, _, columns = out_PTN.shape
    assert inner % parts == 0, "parts must be equal"
    part = inner // parts
    if tile is None and num_rows <= _EARLY_ROWS_MAX and part == PART:
        _launch_early(x_TK, w_NK, out_PTN, pdl)
        return
    if tile is None:
        tile = _SHORT if num_rows <= 16 else _TALL
    depth = math.gcd(tile.depth, part)
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
        **launch_options(pdl),
    )


def _launch_early(
    x_TK: torch.Tensor, w_NK: torch.Tensor, out_PTN: torch.Tensor, pdl: bool, columns: int = 32
) -> None:
    num_rows, inner = x_TK.shape
    _linear_early[(triton.cdiv(w_NK.shape[0], columns), inner // PART)](
        x_TK,
        w_NK,
        out_PTN,
        num_rows,
        INNER=inner,
        COLUMNS=w_NK.shape[0],
        PART=PART,
        BLOCK_T=16 if num_rows <= 16 else 32,
        BLOCK_N=columns,
        num_warps=4,
        **launch_options(pdl),
    )


@triton.jit(do_not_specialize=["num_rows"])
def _linear_early(
    x_ptr,
    w_ptr,
    out_ptr,
    num_rows,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program's weights are all read before it waits for its input: they come in while the
    kernels before still work."""
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    k = part * PART + tl.arange(0, PART)
    release_successor(PDL)
    if COLUMNS % BLOCK_N == 0:
        w = tl.load(w_ptr + n[:, None] * INNER + k[None, :])
    else:
        w = tl.load(w_ptr + n[:, None] * INNER + k[None, :], mask=n[:, None] < COLUMNS, other=0.0)
    await_predecessor(PDL)
    is_row = t[:, None] < num_rows
    x = tl.load(x_ptr + t[:, None] * INNER + k[None, :], mask=is_row, other=0.0)
    y = tl.dot(x, w.T)
    out = out_ptr + (part * num_rows + t[:, None]) * COLUMNS + n[None, :]
    tl.store(out, y, mask=is_row & (n[None, :] < COLUMNS))


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
    PDL: tl.constexpr,
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
    after_predecessor(PDL)
    for start in range(0, PART, BLOCK_K):
        x = tl.load(x_ptrs + start, mask=is_row, other=0.0)
        if COLUMNS % BLOCK_N == 0:
            w = tl.load(w_ptrs + start)
        else:
            w = tl.load(w_ptrs + start, mask=is_column, other=0.0)
        acc = tl.dot(x, w.T, acc)
    out = out_ptr + (part * num_rows + t[:, None]).to(tl.int64) * COLUMNS + n[None, :]
    tl.store(out, acc, mask=is_row & (n[None, :] < COLUMNS))
