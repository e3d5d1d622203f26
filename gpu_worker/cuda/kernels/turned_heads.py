"""Heads of one row from the parts of a product: queries and keys normed and rotated, values as they
are. Pieces of kernels: those of `attention`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turn(low, high, norm_low, norm_high, cos, sin, square, eps, HALF: tl.constexpr):
    """The halves of heads whose squares add up to `square`, normed and rotated."""
    scale = tl.rsqrt(square / (2 * HALF) + eps)
    low = low * scale * norm_low
    high = high * scale * norm_high
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def turned_queries(
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
    """Of the heads of one row, `[ROWS, 2 · HALF]` in float32. One block shape, and as many warps,
    for every caller: the order of the sums is part of the result."""
    i = tl.arange(0, HALF)
    low = tl.zeros([ROWS, HALF], dtype=tl.float32)
    high = tl.zeros([ROWS, HALF], dtype=tl.float32)
    heads_ptr = row_ptr + head[:, None] * (2 * HALF) + i[None, :]
    for part in tl.static_range(PARTS):
        ptr = heads_ptr + part * part_stride.to(tl.int64)
        low += tl.load(ptr, mask=is_head[:, None], other=0.0).to(tl.float32)
        high += tl.load(ptr + HALF, mask=is_head[:, None], other=0.0).to(tl.float32)
    norm_low = tl.load(q_norm_ptr + i).to(tl.float32)[None, :]
    norm_high = tl.load(q_norm_ptr + HALF + i).to(tl.float32)[None, :]
    cos = tl.load(cos_ptr + position * HALF + i)[None, :]
    sin = tl.load(sin_ptr + position * HALF + i)[None, :]
    square = tl.sum(low * low + high * high, axis=1)[:, None]
    low, high = _turn(low, high, norm_low, norm_high, cos, sin, square, eps, HALF)
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [ROWS, 2 * HALF])


@triton.jit
def turned_key(
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
    """Of the head that starts at `column`, `[2 · HALF]` in float32; as `turned_queries`."""
    i = tl.arange(0, HALF)
    low = tl.zeros([HALF], dtype=tl.float32)
    high = tl.zeros([HALF], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        ptr = row_ptr + part * part_stride.to(tl.int64) + column + i
        low += tl.load(ptr).to(tl.float32)
        high += tl.load(ptr + HALF).to(tl.float32)
    norm_low = tl.load(k_norm_ptr + i).to(tl.float32)
    norm_high = tl.load(k_norm_ptr + HALF + i).to(tl.float32)
    cos = tl.load(cos_ptr + position * HALF + i)
    sin = tl.load(sin_ptr + position * HALF + i)
    square = tl.sum(low * low + high * high, axis=0)
    low, high = _turn(low, high, norm_low, norm_high, cos, sin, square, eps, HALF)
    return tl.reshape(tl.permute(tl.join(low, high), (1, 0)), [2 * HALF])


@triton.jit
def summed_value(row_ptr, part_stride, column, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    d = tl.arange(0, HEAD_DIM)
    value = tl.zeros([HEAD_DIM], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        value += tl.load(row_ptr + part * part_stride.to(tl.int64) + column + d).to(tl.float32)
    return value
