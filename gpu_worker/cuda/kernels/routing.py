"""From router scores to work: top-k, the slots of the chosen experts, and the tiles of rows that
each slot computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_CHUNK = 256
_COMPARISONS = 16_384  # a block of them, over 4 warps
NO_SLOT = -1


class SlotTiles(NamedTuple):
    """Work for the expert kernels: tile c computes rows `order[first … first + count - 1]` with the
    weights of its slot. `order_N` names pairs; `tiles_C3` is (slot, first, count)."""

    order_N: torch.Tensor
    tiles_C3: torch.Tensor
    num_tiles_1: torch.Tensor
    rows: int


def slot_tiles(num_pairs: int, num_slots: int, rows: int, device: torch.device) -> SlotTiles:
    tiles = min(num_pairs, num_slots + num_pairs // rows)
    return SlotTiles(
        order_N=torch.zeros(num_pairs, dtype=torch.int32, device=device),
        tiles_C3=torch.zeros(tiles, 3, dtype=torch.int32, device=device),
        num_tiles_1=torch.zeros(1, dtype=torch.int32, device=device),
        rows=rows,
    )


def choose_slots(
    scores_TE: torch.Tensor,
    slot_of_E: torch.Tensor,
    position_T: torch.Tensor,
    slots_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    normalise: bool,
) -> None:
    """Softmax over all experts, the k largest (of equals the lowest id), their slots by
    `slot_of_E`. Rows without a token (position -1) get NO_SLOT."""
    rows, experts = scores_TE.shape
    _choose_slots[(rows,)](
        scores_TE,
        slot_of_E,
        position_T,
        slots_TK,
        weights_TK,
        EXPERTS=experts,
        BLOCK_E=triton.next_power_of_2(experts),
        CHUNK=max(16, min(_COMPARISONS // experts, triton.next_power_of_2(experts))),
        TOP_K=slots_TK.shape[1],
        NORMALISE=normalise,
        num_warps=4,
    )


def group_by_slot(slots_TK: torch.Tensor, num_slots: int, tiles: SlotTiles) -> None:
    """Fills `tiles`: pairs in the order of their slots, then of the pairs themselves."""
    rows, top_k = slots_TK.shape
    _group_by_slot[(rows + 1,)](
        slots_TK,
        tiles.order_N,
        tiles.tiles_C3,
        tiles.num_tiles_1,
        rows * top_k,
        TOP_K=top_k,
        BLOCK_K=triton.next_power_of_2(top_k),
        SLOTS=num_slots,
        BLOCK_S=triton.next_power_of_2(num_slots),
        TILE_ROWS=tiles.rows,
        TILES_OF_SLOT=triton.cdiv(rows, tiles.rows),
        CHUNK=min(_CHUNK, triton.next_power_of_2(rows * top_k)),
        num_warps=4,
    )


def tile_counts(counts_S: torch.Tensor, rows_of_slot: int, tiles: SlotTiles) -> None:
    """For rows that lie padded by slot: slot s holds `counts_S[s]` rows from `s · rows_of_slot`."""
    num_slots = counts_S.shape[0]
    _tile_counts[(1,)](
        counts_S,
        tiles.tiles_C3,
        tiles.num_tiles_1,
        SLOTS=num_slots,
        BLOCK_S=triton.next_power_of_2(num_slots),
        ROWS_OF_SLOT=rows_of_slot,
        TILE_ROWS=tiles.rows,
        num_warps=4,
    )


@triton.jit
def _choose_slots(
    scores_ptr,
    slot_of_ptr,
    position_ptr,
    slots_ptr,
    weights_ptr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """An expert's place among the chosen is the number of experts before it: no search for one
    maximum after the other."""
    row = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    is_expert = e < EXPERTS
    slot = tl.load(slot_of_ptr + e, mask=is_expert, other=-1)
    row_ptr = scores_ptr + row * EXPERTS
    scores = tl.load(row_ptr + e, mask=is_expert, other=float("-inf"))
    is_token = tl.load(position_ptr + row) >= 0
    place = tl.zeros([BLOCK_E], dtype=tl.int32)
    for start in range(0, EXPERTS, CHUNK):
        other = start + tl.arange(0, CHUNK)
        score = tl.load(row_ptr + other, mask=other < EXPERTS, other=float("-inf"))
        before = (score[None, :] > scores[:, None]) | (
            (score[None, :] == scores[:, None]) & (other[None, :] < e[:, None])
        )
        place += tl.sum(before.to(tl.int32), axis=1)
    is_chosen = (place < TOP_K) & is_expert
    weight = tl.exp(scores - tl.max(scores, axis=0))
    total = tl.sum(tl.where(is_chosen, weight, 0.0) if NORMALISE else weight, axis=0)
    slot = tl.where(is_token, slot, -1).to(slots_ptr.dtype.element_ty)
    tl.store(slots_ptr + row * TOP_K + place, slot, mask=is_chosen)
    tl.store(weights_ptr + row * TOP_K + place, weight / total, mask=is_chosen)


@triton.jit
def _write_tiles(
    counts,
    first_rows,
    tiles_ptr,
    num_tiles_ptr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES_OF_SLOT: tl.constexpr,
):
    s = tl.arange(0, BLOCK_S)
    num_tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    first_tile = tl.cumsum(num_tiles, axis=0) - num_tiles
    for i in range(TILES_OF_SLOT):
        has = i < num_tiles
        out = tiles_ptr + (first_tile + i) * 3
        left = tl.minimum(counts - i * TILE_ROWS, TILE_ROWS)
        tl.store(out, s, mask=has)
        tl.store(out + 1, first_rows + i * TILE_ROWS, mask=has)
        tl.store(out + 2, left, mask=has)
    tl.store(num_tiles_ptr, tl.sum(num_tiles, axis=0))


@triton.jit(do_not_specialize=["num_pairs"])
def _group_by_slot(
    slots_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_pairs,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES_OF_SLOT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program t finds the places of token t's pairs; one more counts and cuts the tiles."""
    row = tl.program_id(0)
    n = tl.arange(0, CHUNK)
    if row * TOP_K < num_pairs:
        k = tl.arange(0, BLOCK_K)
        pair = row * TOP_K + k
        mine = tl.load(slots_ptr + pair, mask=k < TOP_K, other=-1).to(tl.int32)
        mine = tl.where(mine < 0, SLOTS, mine)
        place = tl.zeros([BLOCK_K], dtype=tl.int32)
        for start in range(0, num_pairs, CHUNK):
            at = start + n
            slot = tl.load(slots_ptr + at, mask=at < num_pairs, other=SLOTS + 1).to(tl.int32)
            slot = tl.where(slot < 0, SLOTS, slot)
            before = (slot[None, :] < mine[:, None]) | (
                (slot[None, :] == mine[:, None]) & (at[None, :] < pair[:, None])
            )
            place += tl.sum(before.to(tl.int32), axis=1)
        tl.store(order_ptr + place, pair, mask=k < TOP_K)
    else:
        counts = tl.zeros([BLOCK_S], dtype=tl.int32)
        for start in range(0, num_pairs, CHUNK):
            at = start + n
            slot = tl.load(slots_ptr + at, mask=at < num_pairs, other=-1).to(tl.int32)
            counts += tl.histogram(tl.maximum(slot, 0), BLOCK_S, mask=slot >= 0)
        first_rows = tl.cumsum(counts, axis=0) - counts
        _write_tiles(
            counts, first_rows, tiles_ptr, num_tiles_ptr, SLOTS, BLOCK_S, TILE_ROWS, TILES_OF_SLOT
        )


@triton.jit
def _tile_counts(
    counts_ptr,
    tiles_ptr,
    num_tiles_ptr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS_OF_SLOT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    s = tl.arange(0, BLOCK_S)
    counts = tl.load(counts_ptr + s, mask=s < SLOTS, other=0).to(tl.int32)
    _write_tiles(
        counts,
        s * ROWS_OF_SLOT,
        tiles_ptr,
        num_tiles_ptr,
        SLOTS,
        BLOCK_S,
        TILE_ROWS,
        (ROWS_OF_SLOT + TILE_ROWS - 1) // TILE_ROWS,
    )
