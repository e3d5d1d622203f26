"""`experts` for weights in block-scaled FP8. They are read as they are, half the bytes of bfloat16,
and widened in registers, which is exact: a row's product with a block of 128 positions is that with
the block's codes times its scale, in float32.

The weights are the first operand of every product, so that all tiles, of one row or of a hundred,
multiply by the instruction of warp groups, which takes that operand from registers: the bits of a
row do not depend on its tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.expert_rows import (
    FusedChoice,
    Rows,
    choice_arguments,
    choice_sizes,
    choose_slot,
    find_rows,
    row_pointers,
    tiles_at_once,
    tiles_end,
    ungrouped_row,
)
from gpu_worker.cuda.kernels.scaled_operands import ScaledTile, load_rows, widen, widens_in_pairs
from gpu_worker.cuda.weights.scaled_blocks import BLOCK, ScaledBlocks

# The fastest as measured: few stages leave room for more programs on a processor.
_GATE_UP_UNGROUPED = ScaledTile(columns=64, warps=4, stages=3)
_GATE_UP_GROUPED = ScaledTile(columns=64, warps=4, stages=3)
_DOWN_UNGROUPED = ScaledTile(columns=64, warps=4, stages=3)
_DOWN_GROUPED = ScaledTile(columns=64, warps=4, stages=3)
_TALL = ScaledTile(columns=64, warps=4, stages=3)
_TALL_ROWS = 128
"""A tile of so many rows that is at most half full is computed as one of half that height."""


def gate_up(
    x: torch.Tensor,
    w_gate_up: ScaledBlocks,
    rows: Rows,
    inner_NI: torch.Tensor,
    *,
    chosen: FusedChoice | None = None,
    tile: ScaledTile | None = None,
) -> None:
    """As `experts.gate_up`. `w_gate_up` has codes `[S, 2I, H]`. Any multiples of 16 will do for I
    and H."""
    assert chosen is None or rows.tiles is None, "only pairs without tiles choose their slots here"
    _, double_inner, hidden = w_gate_up.codes.shape
    inner = double_inner // 2
    tile = tile or _tile_for(rows, _GATE_UP_UNGROUPED, _GATE_UP_GROUPED)
    programs = triton.cdiv(inner, tile.columns // 2)
    _gate_up[(programs, tiles_at_once(rows, programs))](
        x,
        w_gate_up.codes,
        w_gate_up.scales,
        *row_pointers(rows),
        inner_NI,
        *choice_arguments(chosen, rows),
        HIDDEN=hidden,
        INNER=inner,
        ROW=x.stride(0),
        DIVISOR=rows.slots_TK.shape[-1],
        **choice_sizes(chosen),
        **_launch_options(rows, tile, x),
    )


def down(
    inner_NI: torch.Tensor,
    w_down: ScaledBlocks,
    rows: Rows,
    y_NH: torch.Tensor,
    *,
    tile: ScaledTile | None = None,
) -> None:
    """As `experts.down`. `w_down` has codes `[S, H, I]`."""
    _, hidden, inner = w_down.codes.shape
    tile = tile or _tile_for(rows, _DOWN_UNGROUPED, _DOWN_GROUPED)
    programs = triton.cdiv(hidden, tile.columns)
    _down[(programs, tiles_at_once(rows, programs))](
        inner_NI,
        w_down.codes,
        w_down.scales,
        *row_pointers(rows),
        y_NH,
        HIDDEN=hidden,
        INNER=inner,
        ROW=y_NH.stride(0),
        **_launch_options(rows, tile, inner_NI),
    )


def _tile_for(rows: Rows, ungrouped: ScaledTile, grouped: ScaledTile) -> ScaledTile:
    if rows.tiles is None:
        return ungrouped
    return _TALL if rows.tiles.rows >= _TALL_ROWS else grouped


def _launch_options(rows: Rows, tile: ScaledTile, x: torch.Tensor) -> dict[str, int | bool]:
    block_rows = 16 if rows.tiles is None else rows.tiles.rows
    return {
        "BLOCK_T": block_rows,
        "BLOCK_C": tile.columns,
        "BLOCK_K": BLOCK,
        "GROUPED": rows.tiles is not None,
        "PADDED": rows.padded,
        "HALVED": block_rows >= _TALL_ROWS,
        "IN_PAIRS": widens_in_pairs(x),
        "UNROLL": tile.unroll,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit
def _gate_up(
    x_ptr,
    w_ptr,
    scales_ptr,
    slots_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    inner_ptr,
    scores_ptr,
    slot_of_ptr,
    position_ptr,
    weights_ptr,
    factor,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROW: tl.constexpr,
    DIVISOR: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPED: tl.constexpr,
    PADDED: tl.constexpr,
    HALVED: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    for tile in range(tl.program_id(1), tiles_end(num_tiles_ptr, PADDED), tl.num_programs(1)):
        if EXPERTS > 0:
            slot = choose_slot(
                tile, scores_ptr, slot_of_ptr, position_ptr, slots_ptr, weights_ptr, factor,
                DIVISOR, EXPERTS, BLOCK_E, CHUNK, NORMALISE,
            )  # fmt: skip
            rows, is_row = ungrouped_row(tile, BLOCK_T)
        else:
            slot, rows, is_row = find_rows(
                tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T, GROUPED, PADDED
            )
        if slot >= 0:
            if HALVED and tl.sum(is_row.to(tl.int32), axis=0) <= BLOCK_T // 2:
                _, half, is_half = find_rows(
                    tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T // 2, GROUPED,
                    PADDED,
                )  # fmt: skip
                _gate_up_rows(
                    x_ptr, w_ptr, scales_ptr, inner_ptr, slot, half, is_half, HIDDEN, INNER,
                    ROW, 1 if PADDED else DIVISOR, BLOCK_T // 2, BLOCK_C, BLOCK_K, IN_PAIRS, UNROLL,
                )  # fmt: skip
            else:
                _gate_up_rows(
                    x_ptr, w_ptr, scales_ptr, inner_ptr, slot, rows, is_row, HIDDEN, INNER,
                    ROW, 1 if PADDED else DIVISOR, BLOCK_T, BLOCK_C, BLOCK_K, IN_PAIRS, UNROLL,
                )  # fmt: skip


@triton.jit
def _gate_up_rows(
    x_ptr,
    w_ptr,
    scales_ptr,
    inner_ptr,
    slot,
    rows,
    is_row,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROW: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Eight rows of gate and the same eight of up take turns, so that a thread gets the sums of
    both."""
    COLUMNS: tl.constexpr = BLOCK_C // 2
    ALL_COLUMNS: tl.constexpr = INNER % COLUMNS == 0
    K_BLOCKS: tl.constexpr = (HIDDEN + BLOCK_K - 1) // BLOCK_K
    SCALES: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K * K_BLOCKS  # of each of the two
    first = tl.program_id(0) * COLUMNS
    c = tl.arange(0, BLOCK_C)
    column = first + c // 16 * 8 + c % 8
    is_up = c // 8 % 2
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (rows // DIVISOR)[:, None] * ROW + k[None, :]
    w_rows = is_up * INNER + column
    w_ptrs = w_ptr + slot * (2 * INNER * HIDDEN) + w_rows[:, None] * HIDDEN + k[None, :]
    scale_ptr = scales_ptr + slot * (2 * SCALES) + first // BLOCK_K * K_BLOCKS
    gate_scale = tl.load(scale_ptr)
    up_scale = tl.load(scale_ptr + SCALES)
    sums = tl.zeros([BLOCK_C, BLOCK_T], dtype=tl.float32)
    for block in tl.range(K_BLOCKS, loop_unroll_factor=UNROLL):
        start = block * BLOCK_K
        x = load_rows(x_ptrs + start, is_row, HIDDEN - start, False, HIDDEN % BLOCK_K == 0)
        w = load_rows(
            w_ptrs + start, column < INNER, HIDDEN - start, ALL_COLUMNS, HIDDEN % BLOCK_K == 0
        )
        scale = tl.where(is_up == 0, gate_scale, up_scale)
        following = tl.minimum(block + 1, K_BLOCKS - 1)
        gate_scale = tl.load(scale_ptr + following)
        up_scale = tl.load(scale_ptr + SCALES + following)
        sums = tl.fma(tl.dot(widen(w, x, IN_PAIRS), x.T), scale[:, None], sums)
    both = tl.reshape(sums, [BLOCK_C // 16, 2, 8, BLOCK_T])
    gate, up = tl.split(tl.permute(both, [0, 2, 3, 1]))
    inner = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, [COLUMNS, BLOCK_T])
    n = first + tl.arange(0, COLUMNS)
    out = inner_ptr + rows[None, :] * INNER + n[:, None]
    tl.store(out, inner.to(inner_ptr.dtype.element_ty), mask=is_row[None, :] & (n[:, None] < INNER))


@triton.jit
def _down(
    inner_ptr,
    w_ptr,
    scales_ptr,
    slots_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    y_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPED: tl.constexpr,
    PADDED: tl.constexpr,
    HALVED: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    for tile in range(tl.program_id(1), tiles_end(num_tiles_ptr, PADDED), tl.num_programs(1)):
        slot, rows, is_row = find_rows(
            tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T, GROUPED, PADDED
        )
        if slot >= 0:
            if HALVED and tl.sum(is_row.to(tl.int32), axis=0) <= BLOCK_T // 2:
                _, half, is_half = find_rows(
                    tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T // 2, GROUPED,
                    PADDED,
                )  # fmt: skip
                _down_rows(
                    inner_ptr, w_ptr, scales_ptr, y_ptr, slot, half, is_half, HIDDEN, INNER,
                    ROW, BLOCK_T // 2, BLOCK_C, BLOCK_K, IN_PAIRS, UNROLL,
                )  # fmt: skip
            else:
                _down_rows(
                    inner_ptr, w_ptr, scales_ptr, y_ptr, slot, rows, is_row, HIDDEN, INNER,
                    ROW, BLOCK_T, BLOCK_C, BLOCK_K, IN_PAIRS, UNROLL,
                )  # fmt: skip


@triton.jit
def _down_rows(
    inner_ptr,
    w_ptr,
    scales_ptr,
    y_ptr,
    slot,
    rows,
    is_row,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    K_BLOCKS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    SCALES: tl.constexpr = (HIDDEN + BLOCK_K - 1) // BLOCK_K * K_BLOCKS
    first = tl.program_id(0) * BLOCK_C
    n = first + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = inner_ptr + rows[:, None] * INNER + k[None, :]
    w_ptrs = w_ptr + slot * (HIDDEN * INNER) + n[:, None] * INNER + k[None, :]
    scale_ptr = scales_ptr + slot * SCALES + first // BLOCK_K * K_BLOCKS
    scale = tl.load(scale_ptr)
    y = tl.zeros([BLOCK_C, BLOCK_T], dtype=tl.float32)
    for block in tl.range(K_BLOCKS, loop_unroll_factor=UNROLL):
        start = block * BLOCK_K
        x = load_rows(x_ptrs + start, is_row, INNER - start, False, INNER % BLOCK_K == 0)
        w = load_rows(
            w_ptrs + start, n < HIDDEN, INNER - start, HIDDEN % BLOCK_C == 0, INNER % BLOCK_K == 0
        )
        following = tl.load(scale_ptr + tl.minimum(block + 1, K_BLOCKS - 1))
        y = tl.fma(tl.dot(widen(w, x, IN_PAIRS), x.T), scale, y)
        scale = following
    out = y_ptr + rows[None, :] * ROW + n[:, None]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=is_row[None, :] & (n[:, None] < HIDDEN))
