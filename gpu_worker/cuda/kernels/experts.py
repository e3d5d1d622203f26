"""Applies the experts in a rank's slots to their rows: gate and up with the activation, then down.
Each weight is read once per tile of rows, so at decode once per step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.activation import SILU_GATED, Epilogue, gated, with_bias
from gpu_worker.cuda.kernels.routing import (
    Choice,
    SlotTiles,
    comparisons_at_once,
    ranked,
    softmax_weights,
)
from gpu_worker.cuda.kernels.tall_experts import TALL_ROWS, down_tall, gate_up_tall


class ExpertTile(NamedTuple):
    """Launch parameters. None of them changes a bit of the result."""

    columns: int
    depth: int
    warps: int
    stages: int


# The fastest as measured: few experts need more programs, many need longer reads.
_GATE_UP_UNGROUPED = ExpertTile(columns=32, depth=128, warps=4, stages=3)
_GATE_UP_GROUPED = ExpertTile(columns=32, depth=256, warps=4, stages=4)
_DOWN_UNGROUPED = ExpertTile(columns=64, depth=128, warps=4, stages=3)
_DOWN_GROUPED = ExpertTile(columns=64, depth=256, warps=4, stages=3)
_GATE_UP_MANY = ExpertTile(columns=64, depth=64, warps=4, stages=4)
_DOWN_MANY = ExpertTile(columns=128, depth=64, warps=4, stages=4)
_MANY_ROWS = 64  # of a tile
_SMALL_INNER = 4096  # up to this size, 32 columns per program leave parts of a large card idle
_PADDED_PROGRAMS = 1024
"""Programs of one GEMM over padded rows. Only the device knows how many tiles there are, and
starting a program for every possible tile would take longer than the work."""


class FusedChoice(NamedTuple):
    """A choice that the gate-and-up kernel makes itself. It writes the weights to `weights_TK` and
    the slots to `Rows.slots_TK`."""

    choice: Choice
    weights_TK: torch.Tensor


class Rows(NamedTuple):
    """Which rows each tile computes.

    Row n of the work is pair `tiles.order_N[n]`, and its input row is `pair // K`. Without `tiles`,
    tile c is pair c alone, in slot `slots_TK.flatten()[c]`. With `padded`, the row numbers of the
    tiles are rows of the input and of the output themselves.
    """

    slots_TK: torch.Tensor
    tiles: SlotTiles | None
    padded: bool = False


def dense_mlp_tile(rows: int, inner: int) -> ExpertTile:
    """The tile for one MLP that all rows go through, in tiles of `rows` rows. A small MLP is split
    into more programs. Tiles of 64 rows and more run on two warps, because with four the compiler
    would choose another instruction."""
    if rows >= 64:
        return ExpertTile(columns=32, depth=64, warps=2, stages=3)
    return ExpertTile(columns=16 if inner <= _SMALL_INNER else 32, depth=256, warps=4, stages=4)


def gate_up(
    x: torch.Tensor,
    w_gate_up_SJH: torch.Tensor,
    rows: Rows,
    inner_NI: torch.Tensor,
    *,
    chosen: FusedChoice | None = None,
    epilogue: Epilogue = SILU_GATED,
    tile: ExpertTile | None = None,
) -> None:
    """`inner = silu(gate x) · (up x)`, if `epilogue` says nothing else. `w_gate_up_SJH` holds gate,
    then up.

    If each pair is its own tile, `chosen` lets this kernel choose the slots itself. The choice has
    the same bits as that of `routing.choose_slots`, and saves its launch.
    """
    if rows.tiles is not None and rows.tiles.rows == TALL_ROWS and tile is None:
        gate_up_tall(x, w_gate_up_SJH, rows.tiles, inner_NI, epilogue, divisor=_divisor(rows))
        return
    assert chosen is None or rows.tiles is None, "only pairs without tiles choose their slots here"
    _, double_inner, hidden = w_gate_up_SJH.shape
    inner = double_inner // 2
    tile = tile or _tile_for(rows, _GATE_UP_UNGROUPED, _GATE_UP_GROUPED, _GATE_UP_MANY)
    columns, depth = _fit(tile.columns, inner), _fit(tile.depth, hidden)
    _gate_up[(inner // columns, _tiles_at_once(rows, inner // columns))](
        x,
        w_gate_up_SJH,
        *_row_pointers(rows),
        inner_NI,
        *_choice_arguments(chosen, rows),
        x if epilogue.b_gate_up_SJ is None else epilogue.b_gate_up_SJ,
        HIDDEN=hidden,
        INNER=inner,
        DIVISOR=rows.slots_TK.shape[-1],
        **_choice_sizes(chosen),
        BIASED=epilogue.b_gate_up_SJ is not None,
        CLAMPED=epilogue.clamped,
        **_launch_options(rows, columns, depth, tile),
    )


def down(
    inner_NI: torch.Tensor,
    w_down_SHI: torch.Tensor,
    rows: Rows,
    y_NH: torch.Tensor,
    *,
    epilogue: Epilogue = SILU_GATED,
    tile: ExpertTile | None = None,
) -> None:
    """`y = w_down inner`, per row in the weights of its slot, plus the bias of `epilogue`."""
    if rows.tiles is not None and rows.tiles.rows == TALL_ROWS and tile is None:
        down_tall(inner_NI, w_down_SHI, rows.tiles, y_NH, epilogue, padded=rows.padded)
        return
    _, hidden, inner = w_down_SHI.shape
    tile = tile or _tile_for(rows, _DOWN_UNGROUPED, _DOWN_GROUPED, _DOWN_MANY)
    columns, depth = _fit(tile.columns, hidden), _fit(tile.depth, inner)
    _down[(hidden // columns, _tiles_at_once(rows, hidden // columns))](
        inner_NI,
        w_down_SHI,
        *_row_pointers(rows),
        y_NH,
        inner_NI if epilogue.b_down_SH is None else epilogue.b_down_SH,
        HIDDEN=hidden,
        INNER=inner,
        BIASED=epilogue.b_down_SH is not None,
        **_launch_options(rows, columns, depth, tile),
    )


def _divisor(rows: Rows) -> int:
    """By how much the number of a row of work is divided for that of its input; 0 if it is padded:
    see `Rows`."""
    return 0 if rows.padded else rows.slots_TK.shape[-1]


def _tile_for(
    rows: Rows, ungrouped: ExpertTile, grouped: ExpertTile, many: ExpertTile
) -> ExpertTile:
    if rows.tiles is None:
        return ungrouped
    return many if rows.tiles.rows >= _MANY_ROWS else grouped


def _launch_options(
    rows: Rows, columns: int, depth: int, tile: ExpertTile
) -> dict[str, int | bool]:
    return {
        "BLOCK_T": 16 if rows.tiles is None else rows.tiles.rows,
        "BLOCK_N": columns,
        "BLOCK_K": depth,
        "GROUPED": rows.tiles is not None,
        "PADDED": rows.padded,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _fit(block: int, size: int) -> int:
    """The block, halved until it divides the size. A dot product needs at least 16."""
    block = math.gcd(block, size)
    assert block >= 16, "inner and hidden sizes must be multiples of 16"
    return block


def _tiles_at_once(rows: Rows, blocks: int) -> int:
    """The number of tiles that have programs of their own, `blocks` each. Only the programs of
    padded rows continue with a further tile."""
    if rows.tiles is None:
        return rows.slots_TK.numel()
    tiles_max = rows.tiles.tiles_C3.shape[0]
    return min(tiles_max, triton.cdiv(_PADDED_PROGRAMS, blocks)) if rows.padded else tiles_max


def _row_pointers(rows: Rows) -> tuple[torch.Tensor, ...]:
    if rows.tiles is None:
        return (rows.slots_TK,) * 4
    return (rows.slots_TK, rows.tiles.order_N, rows.tiles.tiles_C3, rows.tiles.num_tiles_1)


def _choice_arguments(chosen: FusedChoice | None, rows: Rows) -> tuple[torch.Tensor | float, ...]:
    if chosen is None:
        return (*(rows.slots_TK,) * 4, 1.0)
    choice = chosen.choice
    inputs = (choice.scores_TE, choice.slot_of_UE, choice.position_T)
    return (*inputs, chosen.weights_TK, choice.factor)


def _choice_sizes(chosen: FusedChoice | None) -> dict[str, int | bool]:
    """EXPERTS of 0 means that the slots are given."""
    if chosen is None:
        return {"EXPERTS": 0, "BLOCK_E": 1, "CHUNK": 1, "NORMALISE": False}
    experts = chosen.choice.scores_TE.shape[1]
    return {
        "EXPERTS": experts,
        "BLOCK_E": triton.next_power_of_2(experts),
        "CHUNK": comparisons_at_once(experts),
        "NORMALISE": chosen.choice.normalise,
    }


@triton.jit
def _tiles_end(num_tiles_ptr, PADDED: tl.constexpr):
    """The end of the tiles that a program steps through by `num_programs(1)`."""
    end = tl.num_programs(1)
    if PADDED:
        end = tl.load(num_tiles_ptr)
    return end


@triton.jit
def _ungrouped_row(pair, BLOCK_T: tl.constexpr):
    """(rows of the work, mask) of a pair that is its own tile."""
    t = tl.arange(0, BLOCK_T)
    return (pair + t * 0).to(tl.int64), t < 1


@triton.jit
def _find_rows(
    tile,
    slots_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    BLOCK_T: tl.constexpr,
    GROUPED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """(slot or -1, rows of the work, mask) of a tile."""
    t = tl.arange(0, BLOCK_T)
    if GROUPED:
        is_tile = tile < tl.load(num_tiles_ptr)
        slot = tl.load(tiles_ptr + tile * 3, mask=is_tile, other=-1).to(tl.int64)
        first = tl.load(tiles_ptr + tile * 3 + 1, mask=is_tile, other=0)
        count = tl.load(tiles_ptr + tile * 3 + 2, mask=is_tile, other=0)
        is_row = t < count
        if PADDED:
            rows = (first + t).to(tl.int64)
        else:
            rows = tl.load(order_ptr + first + t, mask=is_row, other=0).to(tl.int64)
    else:
        slot = tl.load(slots_ptr + tile).to(tl.int64)
        rows, is_row = _ungrouped_row(tile, BLOCK_T)
    return slot, rows, is_row


@triton.jit
def _choose_slot(
    pair,
    scores_ptr,
    slot_of_ptr,
    position_ptr,
    slots_ptr,
    weights_ptr,
    factor,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """The slot of a pair's expert. Of the programs that find it, one stores it with its weight."""
    row = pair // TOP_K
    e = tl.arange(0, BLOCK_E)
    is_expert = e < EXPERTS
    slot_of = tl.load(slot_of_ptr + e, mask=is_expert, other=-1)
    row_ptr = scores_ptr + row * EXPERTS
    scores = tl.load(row_ptr + e, mask=is_expert, other=float("-inf"))
    is_token = tl.load(position_ptr + row) >= 0
    index = ranked(row_ptr, scores, EXPERTS, BLOCK_E, CHUNK)
    is_own = index == pair % TOP_K
    slot = tl.max(tl.where(is_own & is_token, slot_of, -1), axis=0).to(tl.int64)
    if tl.program_id(0) == 0:
        weight = softmax_weights(scores, index < TOP_K, factor, NORMALISE)
        tl.store(slots_ptr + pair, slot.to(slots_ptr.dtype.element_ty))
        tl.store(weights_ptr + pair + e * 0, weight, mask=is_own)
    return slot


@triton.jit
def _gate_up(
    x_ptr,
    w_ptr,
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
    bias_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    DIVISOR: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPED: tl.constexpr,
    PADDED: tl.constexpr,
):
    for tile in range(tl.program_id(1), _tiles_end(num_tiles_ptr, PADDED), tl.num_programs(1)):
        if EXPERTS > 0:
            slot = _choose_slot(
                tile,
                scores_ptr,
                slot_of_ptr,
                position_ptr,
                slots_ptr,
                weights_ptr,
                factor,
                DIVISOR,
                EXPERTS,
                BLOCK_E,
                CHUNK,
                NORMALISE,
            )
            rows, is_row = _ungrouped_row(tile, BLOCK_T)
        else:
            slot, rows, is_row = _find_rows(
                tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T, GROUPED, PADDED
            )
        if slot >= 0:
            n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            x_rows = rows if PADDED else rows // DIVISOR
            x_ptrs = x_ptr + x_rows[:, None] * HIDDEN + k[None, :]
            gate_ptrs = w_ptr + slot * (2 * INNER * HIDDEN) + n[:, None] * HIDDEN + k[None, :]
            gate = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
            up = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
            for start in range(0, HIDDEN, BLOCK_K):
                x = tl.load(x_ptrs + start, mask=is_row[:, None], other=0.0)
                gate = tl.dot(x, tl.load(gate_ptrs + start).T, gate)
                up = tl.dot(x, tl.load(gate_ptrs + INNER * HIDDEN + start).T, up)
            inner = gated(gate, up, bias_ptr + slot * (2 * INNER), n, INNER, BIASED, CLAMPED)
            out = inner_ptr + rows[:, None] * INNER + n[None, :]
            tl.store(out, inner.to(inner_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _down(
    inner_ptr,
    w_ptr,
    slots_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    y_ptr,
    bias_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPED: tl.constexpr,
    PADDED: tl.constexpr,
):
    for tile in range(tl.program_id(1), _tiles_end(num_tiles_ptr, PADDED), tl.num_programs(1)):
        slot, rows, is_row = _find_rows(
            tile, slots_ptr, order_ptr, tiles_ptr, num_tiles_ptr, BLOCK_T, GROUPED, PADDED
        )
        if slot >= 0:
            n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            inner_ptrs = inner_ptr + rows[:, None] * INNER + k[None, :]
            w_ptrs = w_ptr + slot * (HIDDEN * INNER) + n[:, None] * INNER + k[None, :]
            y = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
            for start in range(0, INNER, BLOCK_K):
                inner = tl.load(inner_ptrs + start, mask=is_row[:, None], other=0.0)
                y = tl.dot(inner, tl.load(w_ptrs + start).T, y)
            y = with_bias(y, bias_ptr + slot * HIDDEN, n, BIASED)
            out = y_ptr + rows[:, None] * HIDDEN + n[None, :]
            tl.store(out, y.to(y_ptr.dtype.element_ty), mask=is_row[:, None])
