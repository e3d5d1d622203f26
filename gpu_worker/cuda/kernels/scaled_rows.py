"""Converts rows that an exchange delivers in fp8 to the type that the experts compute in. The bits
of a value depend only on its own fp8 value and its scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PROGRAMS = 512  # over all slots: enough for a card, and few if most slots are idle


def dequantise(
    x_SMH: torch.Tensor, scales_SMG: torch.Tensor, counts_S: torch.Tensor, out_NH: torch.Tensor
) -> None:
    """`out = x · scale` for the first `counts_S[s]` of the M rows of each slot s.

    Row m of slot s goes to row `s · M + m` of `out_NH`. The other rows are neither read nor
    written. A row has G scales, one per H / G values; `scales_SMG` may have any strides.
    """
    num_slots, rows_of_slot, hidden = x_SMH.shape
    groups = scales_SMG.shape[2]
    each = max(1, min(rows_of_slot, _PROGRAMS // num_slots))
    _dequantise[(each, num_slots)](
        x_SMH,
        scales_SMG,
        counts_S,
        out_NH,
        *scales_SMG.stride(),
        ROWS_OF_SLOT=rows_of_slot,
        PROGRAMS=each,
        GROUPS=groups,
        BLOCK_G=triton.next_power_of_2(groups),
        SIZE=hidden // groups,
        num_warps=8,
    )


@triton.jit
def _dequantise(
    x_ptr,
    scales_ptr,
    counts_ptr,
    out_ptr,
    slot_stride,
    row_stride,
    group_stride,
    ROWS_OF_SLOT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SIZE: tl.constexpr,
):
    slot = tl.program_id(1).to(tl.int64)
    count = tl.load(counts_ptr + slot)
    g = tl.arange(0, BLOCK_G)
    is_group = g < GROUPS
    values = g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    scale_ptrs = scales_ptr + slot * slot_stride + g * group_stride
    first = slot * ROWS_OF_SLOT
    for row in range(tl.program_id(0), count, PROGRAMS):
        start = (first + row) * (GROUPS * SIZE)
        x = tl.load(x_ptr + start + values, mask=is_group[:, None], other=0.0).to(tl.float32)
        scale = tl.load(scale_ptrs + row * row_stride, mask=is_group, other=0.0)
        out = (x * scale[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + start + values, out, mask=is_group[:, None])
