"""Which rows each program of the experts' kernels computes, and in which slot: pairs of their own,
tiles of rows of one slot, or rows that lie padded by slot. Multiplies nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.routing import (
    Choice,
    SlotTiles,
    comparisons_at_once,
    ranked,
    softmax_weights,
)

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


def tiles_at_once(rows: Rows, blocks: int) -> int:
    """The number of tiles that have programs of their own, `blocks` each. Only the programs of
    padded rows continue with a further tile."""
    if rows.tiles is None:
        return rows.slots_TK.numel()
    tiles_max = rows.tiles.tiles_C3.shape[0]
    return min(tiles_max, triton.cdiv(_PADDED_PROGRAMS, blocks)) if rows.padded else tiles_max


def row_pointers(rows: Rows) -> tuple[torch.Tensor, ...]:
    if rows.tiles is None:
        return (rows.slots_TK,) * 4
    return (rows.slots_TK, rows.tiles.order_N, rows.tiles.tiles_C3, rows.tiles.num_tiles_1)


def choice_arguments(chosen: FusedChoice | None, rows: Rows) -> tuple[torch.Tensor | float, ...]:
    if chosen is None:
        return (*(rows.slots_TK,) * 4, 1.0)
    choice = chosen.choice
    inputs = (choice.scores_TE, choice.slot_of_UE, choice.position_T)
    return (*inputs, chosen.weights_TK, choice.factor)


def choice_sizes(chosen: FusedChoice | None) -> dict[str, int | bool]:
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
def tiles_end(num_tiles_ptr, PADDED: tl.constexpr):
    """The end of the tiles that a program steps through by `num_programs(1)`."""
    end = tl.num_programs(1)
    if PADDED:
        end = tl.load(num_tiles_ptr)
    return end


@triton.jit
def ungrouped_row(pair, BLOCK_T: tl.constexpr):
    """(rows of the work, mask) of a pair that is its own tile."""
    t = tl.arange(0, BLOCK_T)
    return (pair + t * 0).to(tl.int64), t < 1


@triton.jit
def find_rows(
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
        rows, is_row = ungrouped_row(tile, BLOCK_T)
    return slot, rows, is_row


@triton.jit
def choose_slot(
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
