"""What the kernels of block-scaled FP8 weights share: tiles, reads, and how codes are widened in
registers. Those of MXFP4 weights read alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_WIDEN_PAIR = tl.constexpr("""{
.reg .b16 first, second;
.reg .b32 pair;
.reg .f32 first_wide, second_wide;
cvt.rn.f16x2.e4m3x2 pair, $1;
mov.b32 {first, second}, pair;
cvt.f32.f16 first_wide, first;
cvt.f32.f16 second_wide, second;
cvt.rn.bf16x2.f32 $0, second_wide, first_wide;
}""")
"""Two codes to two bfloat16. The compiler's own conversion rounds one value at a time, by an
instruction that takes four times as long."""


class ScaledTile(NamedTuple):
    """Launch parameters. `columns` are the rows of the weights that a program multiplies at once,
    64 for each four warps: those of gate and up count both. A turn of its loop takes `unroll`
    blocks. None of them changes a bit."""

    columns: int
    warps: int
    stages: int
    unroll: int = 1


def widens_in_pairs(x: torch.Tensor) -> bool:
    """Only a card can; the interpreter computes in float32."""
    return x.dtype == torch.bfloat16 and x.is_cuda


@triton.jit
def widen(codes, x, IN_PAIRS: tl.constexpr):
    """The codes in the type of `x`."""
    if IN_PAIRS:
        wide = tl.inline_asm_elementwise(
            _WIDEN_PAIR, "=r,h", [codes], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        wide = codes.to(x.dtype)
    return wide


@triton.jit
def load_rows(pointers, is_row, k_left, ALL_ROWS: tl.constexpr, ALL_K: tl.constexpr):
    """`[rows, K]`, zero where there is no row and from position `k_left` on."""
    k = tl.arange(0, pointers.shape[1])
    if ALL_ROWS and ALL_K:
        values = tl.load(pointers)
    elif ALL_K:
        values = tl.load(pointers, mask=is_row[:, None], other=0.0)
    else:
        values = tl.load(pointers, mask=is_row[:, None] & (k[None, :] < k_left), other=0.0)
    return values
