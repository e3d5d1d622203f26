"""`linear` for weights in block-scaled FP8. It multiplies as `scaled_experts` does, in the parts of
`linear`, and gives the same bits for few rows and for many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.scaled_operands import ScaledTile, load_rows, widen, widens_in_pairs
from gpu_worker.cuda.weights.scaled_blocks import BLOCK, ScaledBlocks

_PARTS_TILE = ScaledTile(columns=64, warps=4, stages=3)
_WHOLE_TILE = ScaledTile(columns=64, warps=4, stages=3)
_WHOLE_ROWS = 128


def linear_parts(
    x_TK: torch.Tensor,
    w_NK: ScaledBlocks,
    out_PTN: torch.Tensor,
    *,
    tile: ScaledTile = _PARTS_TILE,
) -> None:
    """As `linear.linear_parts`. A part consists of whole blocks."""
    num_rows = x_TK.shape[0]
    height = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    _launch(x_TK, w_NK, out_PTN, out_PTN.shape[0], tile, height, in_one=False)


def linear_whole(
    x_TK: torch.Tensor,
    w_NK: ScaledBlocks,
    out_TN: torch.Tensor,
    *,
    parts: int,
    tile: ScaledTile = _WHOLE_TILE,
) -> None:
    """As `linear.linear_whole`. `out_TN` may have any dtype."""
    _launch(x_TK, w_NK, out_TN[None], parts, tile, _WHOLE_ROWS, in_one=True)


def _launch(
    x_TK: torch.Tensor,
    w_NK: ScaledBlocks,
    out_PTN: torch.Tensor,
    parts: int,
    tile: ScaledTile,
    height: int,
    *,
    in_one: bool,
) -> None:
    num_rows, inner = x_TK.shape
    columns = out_PTN.shape[2]
    assert inner % parts == 0, "parts must be equal"
    assert parts == 1 or inner // parts % BLOCK == 0, "a part must consist of whole blocks"
    grid = (
        triton.cdiv(columns, tile.columns),
        1 if in_one else parts,
        triton.cdiv(num_rows, height),
    )
    _multiply[grid](
        x_TK,
        w_NK.codes,
        w_NK.scales,
        out_PTN,
        num_rows,
        INNER=inner,
        COLUMNS=columns,
        PART=inner // parts,
        PARTS_IN_ONE=parts if in_one else 1,
        BLOCK_T=height,
        BLOCK_C=tile.columns,
        BLOCK_K=BLOCK,
        IN_PAIRS=widens_in_pairs(x_TK),
        UNROLL=tile.unroll,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x_ptr,
    w_ptr,
    scales_ptr,
    out_ptr,
    num_rows,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    PARTS_IN_ONE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One part, or all of them one after the other and added."""
    K_BLOCKS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (PART + BLOCK_K - 1) // BLOCK_K
    part = tl.program_id(1)
    first_column = tl.program_id(0) * BLOCK_C
    n = first_column + tl.arange(0, BLOCK_C)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = part * PART + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + t[:, None].to(tl.int64) * INNER + k[None, :]
    w_ptrs = w_ptr + n[:, None].to(tl.int64) * INNER + k[None, :]
    scale_ptr = scales_ptr + first_column // BLOCK_K * K_BLOCKS + part * STEPS
    total = tl.zeros([BLOCK_C, BLOCK_T], dtype=tl.float32)
    sums = tl.zeros([BLOCK_C, BLOCK_T], dtype=tl.float32)
    scale = tl.load(scale_ptr)
    for step in tl.range(STEPS * PARTS_IN_ONE, loop_unroll_factor=UNROLL):
        start = step * BLOCK_K
        left = INNER - part * PART - start
        x = load_rows(x_ptrs + start, t < num_rows, left, False, INNER % BLOCK_K == 0)
        w = load_rows(
            w_ptrs + start, n < COLUMNS, left, COLUMNS % BLOCK_C == 0, INNER % BLOCK_K == 0
        )
        following = tl.load(scale_ptr + tl.minimum(step + 1, STEPS * PARTS_IN_ONE - 1))
        sums = tl.fma(tl.dot(widen(w, x, IN_PAIRS), x.T), scale, sums)
        scale = following
        if PARTS_IN_ONE > 1 and step % STEPS == STEPS - 1:
            total += sums
            sums = tl.zeros([BLOCK_C, BLOCK_T], dtype=tl.float32)
    if PARTS_IN_ONE == 1:
        total = sums
    out = out_ptr + (part * num_rows + t[None, :]).to(tl.int64) * COLUMNS + n[:, None]
    tl.store(
        out,
        total.to(out_ptr.dtype.element_ty),
        mask=(t[None, :] < num_rows) & (n[:, None] < COLUMNS),
    )
