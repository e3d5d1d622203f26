"""The heads of one row from the parts of a split-K GEMM: normed and rotated queries and keys, and
plain values. These are pieces of the kernels in `attention` and `projected_heads`.

What differs between families is compiled away where it is not asked for. NORM: whether heads are
normed, each by itself or by the scale of all heads of the row. BIASED: a bias comes before the
norm. CLIPPED: a bound comes after it. ROTATED is the number of a head's elements that are rotated,
from the first on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, QK_NORM_NONE, QK_NORM_WHOLE
from gpu_worker.cuda.kernels.summed_parts import sum_pairs

_NORM_HEAD = tl.constexpr(QK_NORM_HEAD)
_NORM_NONE = tl.constexpr(QK_NORM_NONE)
_NORM_WHOLE = tl.constexpr(QK_NORM_WHOLE)


@triton.jit
def _clipped(x, clip, CLIPPED: tl.constexpr):
    if CLIPPED:
        x = tl.minimum(tl.maximum(x, -clip), clip)
    return x


@triton.jit
def _rotate(x, partner, cos, sin):
    """`partner` holds for each value the one that it is rotated with. The halves are never joined,
    because a dot product adds in another order if one of its operands was joined."""
    return tl.fma(x, cos, partner * sin)


@triton.jit
def _partner_of(d, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr):
    """The element that each element is rotated with; itself if it is not."""
    other = (d + ROTATED // 2) % ROTATED
    if ROTATED < HEAD_DIM:
        other = tl.where(d < ROTATED, other, d)
    return other


@triton.jit
def _rotation(cos_ptr, sin_ptr, position, d, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr):
    """(cosine, sine with its sign for value `d`) at a position."""
    HALF: tl.constexpr = ROTATED // 2
    at = position * HALF + d % HALF
    if ROTATED < HEAD_DIM:
        cos = tl.load(cos_ptr + at, mask=d < ROTATED, other=1.0)
        sin = tl.load(sin_ptr + at, mask=d < ROTATED, other=0.0)
    else:
        cos = tl.load(cos_ptr + at)
        sin = tl.load(sin_ptr + at)
    return cos, tl.where(d < HALF, -sin, sin)


@triton.jit
def rotated_queries(
    row_ptr,
    norm_ptr,
    bias_ptr,
    scale_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    clip,
    position,
    part_stride,
    head,
    is_head,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    BIASED: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    """The heads `head` of one row, `[ROWS, HEAD_DIM]` in float32. Every caller must use the same
    block shape and number of warps: the order of the sums changes the bits. `scale_ptr` is the
    row's, as `projected_heads` computes it for norms over all heads."""
    d = tl.arange(0, HEAD_DIM)
    other = _partner_of(d, HEAD_DIM, ROTATED)
    heads_ptr = row_ptr + head[:, None] * HEAD_DIM
    x, partner = sum_pairs(
        heads_ptr, part_stride, d, other, is_head[:, None], PARTS, ROWS, HEAD_DIM
    )
    if BIASED:
        biases_ptr = bias_ptr + head[:, None] * HEAD_DIM
        x += tl.load(biases_ptr + d[None, :], mask=is_head[:, None], other=0.0)
        partner += tl.load(biases_ptr + other[None, :], mask=is_head[:, None], other=0.0)
    if NORM == _NORM_HEAD:
        norm = tl.load(norm_ptr + d).to(tl.float32)[None, :]
        norm_partner = tl.load(norm_ptr + other).to(tl.float32)[None, :]
        scale = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / HEAD_DIM + eps)
        x, partner = x * scale * norm, partner * scale * norm_partner
    elif NORM == _NORM_WHOLE:
        norms_ptr = norm_ptr + head[:, None] * HEAD_DIM
        norm = tl.load(norms_ptr + d[None, :], mask=is_head[:, None], other=0.0)
        norm_partner = tl.load(norms_ptr + other[None, :], mask=is_head[:, None], other=0.0)
        scale = tl.load(scale_ptr)
        x, partner = x * scale * norm.to(tl.float32), partner * scale * norm_partner.to(tl.float32)
    x, partner = _clipped(x, clip, CLIPPED), _clipped(partner, clip, CLIPPED)
    cos, sin = _rotation(cos_ptr, sin_ptr, position, d, HEAD_DIM, ROTATED)
    return _rotate(x, partner, cos[None, :], sin[None, :])


@triton.jit
def rotated_key(
    row_ptr,
    norm_ptr,
    bias_ptr,
    scale_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    clip,
    position,
    part_stride,
    kv_head,
    column,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    BIASED: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    """The head `kv_head`, which starts at `column`, `[HEAD_DIM]` in float32. As
    `rotated_queries`."""
    d = tl.arange(0, HEAD_DIM)
    other = _partner_of(d, HEAD_DIM, ROTATED)
    x = summed_value(
        row_ptr, bias_ptr, clip, part_stride, column, d, PARTS, HEAD_DIM, BIASED, False
    )
    partner = summed_value(
        row_ptr, bias_ptr, clip, part_stride, column, other, PARTS, HEAD_DIM, BIASED, False
    )
    if NORM != _NORM_NONE:
        if NORM == _NORM_HEAD:
            scale = tl.rsqrt(tl.sum(x * x, axis=0) / HEAD_DIM + eps)
        else:
            norm_ptr += kv_head * HEAD_DIM
            scale = tl.load(scale_ptr + 1)
        norm = tl.load(norm_ptr + d).to(tl.float32)
        norm_partner = tl.load(norm_ptr + other).to(tl.float32)
        x, partner = x * scale * norm, partner * scale * norm_partner
    x, partner = _clipped(x, clip, CLIPPED), _clipped(partner, clip, CLIPPED)
    cos, sin = _rotation(cos_ptr, sin_ptr, position, d, HEAD_DIM, ROTATED)
    return _rotate(x, partner, cos, sin)


@triton.jit
def summed_value(
    row_ptr,
    bias_ptr,
    clip,
    part_stride,
    column,
    d,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BIASED: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    """The elements `d` of the head that starts at `column`, `[HEAD_DIM]` in float32."""
    value = tl.zeros([HEAD_DIM], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        value += tl.load(row_ptr + part * part_stride.to(tl.int64) + column + d).to(tl.float32)
    if BIASED:
        value += tl.load(bias_ptr + column + d)
    return _clipped(value, clip, CLIPPED)
