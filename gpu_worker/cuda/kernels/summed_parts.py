"""Sums of the partial results of a GEMM that is split along its inner dimension, added in the order
of the parts. These are pieces of other kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_parts_onto(
    total,
    row_ptr,
    i,
    part_stride,
    mask,
    PARTS: tl.constexpr,
    bias_ptr=None,
    BIASED: tl.constexpr = False,
):
    """`total` (float32) plus the sum of the elements `i` of every part's row and of the bias, if
    `mask` is set. `row_ptr` is the row of part 0. The parts are added first, as `linear_whole` adds
    them."""
    added = tl.zeros(total.shape, dtype=tl.float32)
    for part in tl.static_range(PARTS):
        ptr = row_ptr + part * part_stride.to(tl.int64) + i
        added += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        added += tl.load(bias_ptr + i, mask=mask, other=0.0)
    return total + added


@triton.jit
def sum_pairs(
    heads_ptr,
    part_stride,
    low_at,
    high_at,
    is_head,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Two elements per pair and head, `[HEADS, SIZE]` each, in float32: those at `low_at` and those
    at `high_at`. `heads_ptr` and the mask `is_head` are `[HEADS, 1]`; heads outside it give 0."""
    low = tl.zeros([HEADS, SIZE], dtype=tl.float32)
    high = tl.zeros([HEADS, SIZE], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        ptr = heads_ptr + part * part_stride.to(tl.int64)
        low += tl.load(ptr + low_at[None, :], mask=is_head, other=0.0).to(tl.float32)
        high += tl.load(ptr + high_at[None, :], mask=is_head, other=0.0).to(tl.float32)
    return low, high
