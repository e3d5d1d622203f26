"""The heads of one row from the parts of a split-K GEMM: normed and rotated queries and keys, and
plain values. These are pieces of the kernels in `attention`."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_worker.cuda.kernels.summed_parts import sum_pairs


@triton.jit
def _norm_and_rotate(x, partner, norm, norm_partner, cos, sin, square, eps, HALF: tl.constexpr):
    """Norms and rotates heads whose squares add up to `square`. `partner` holds for each value the
    one in the other half that it is rotated with. The halves are never joined, because a dot
    product adds in another order if one of its operands was joined."""
    scale = tl.rsqrt(square / (2 * HALF) + eps)
    return tl.fma(x * scale * norm, cos, partner * scale * norm_partner * sin)


@triton.jit
def _rotation(cos_ptr, sin_ptr, position, d, HALF: tl.constexpr):
    """(cosine, sine with its sign for value `d`) at a position."""
    at = position * HALF + d % HALF
    sin = tl.load(sin_ptr + at)
    return tl.load(cos_ptr + at), tl.where(d < HALF, -sin, sin)


@triton.jit
def rotated_queries(
    row_ptr,
    q_norm_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    position,
    part_stride,
    head,
    is_head,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The heads `head` of one row, `[ROWS, 2 · HALF]` in float32. Every caller must use the same
    block shape and number of warps: the order of the sums changes the bits."""
    d = tl.arange(0, 2 * HALF)
    other = (d + HALF) % (2 * HALF)
    heads_ptr = row_ptr + head[:, None] * (2 * HALF)
    x, partner = sum_pairs(
        heads_ptr, part_stride, d, other, is_head[:, None], PARTS, ROWS, 2 * HALF
    )
    norm = tl.load(q_norm_ptr + d).to(tl.float32)[None, :]
    norm_partner = tl.load(q_norm_ptr + other).to(tl.float32)[None, :]
    cos, sin = _rotation(cos_ptr, sin_ptr, position, d, HALF)
    square = tl.sum(x * x, axis=1)[:, None]
    return _norm_and_rotate(
        x, partner, norm, norm_partner, cos[None, :], sin[None, :], square, eps, HALF
    )


@triton.jit
def rotated_key(
    row_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    position,
    part_stride,
    column,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The head that starts at `column`, `[2 · HALF]` in float32. As `rotated_queries`."""
    d = tl.arange(0, 2 * HALF)
    other = (d + HALF) % (2 * HALF)
    x = tl.zeros([2 * HALF], dtype=tl.float32)
    partner = tl.zeros([2 * HALF], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        ptr = row_ptr + part * part_stride.to(tl.int64) + column
        x += tl.load(ptr + d).to(tl.float32)
        partner += tl.load(ptr + other).to(tl.float32)
    norm = tl.load(k_norm_ptr + d).to(tl.float32)
    norm_partner = tl.load(k_norm_ptr + other).to(tl.float32)
    cos, sin = _rotation(cos_ptr, sin_ptr, position, d, HALF)
    square = tl.sum(x * x, axis=0)
    return _norm_and_rotate(x, partner, norm, norm_partner, cos, sin, square, eps, HALF)


@triton.jit
def summed_value(row_ptr, part_stride, column, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The head that starts at `column`, `[HEAD_DIM]` in float32."""
    d = tl.arange(0, HEAD_DIM)
    value = tl.zeros([HEAD_DIM], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        value += tl.load(row_ptr + part * part_stride.to(tl.int64) + column + d).to(tl.float32)
    return value
