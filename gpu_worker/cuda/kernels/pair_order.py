"""Orders the pairs of a large step by slot, as `routing.group_by_slot` does for a small one. That
compares every pair with every other; this counts pairs per block and slot, so that its work grows
with the number of pairs only. The order is the same: by slot, then by pair number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.routing import SlotTiles, write_tiles

_PAIRS = 256  # per block: within a block every pair is compared with every other
_BLOCKS_AT_ONCE = 32


def new_block_counts(num_pairs: int, num_slots: int, device: torch.device) -> torch.Tensor:
    """Scratch for `order_by_slot` of up to `num_pairs` pairs, int32: per block of
    pairs and slot, with one bin more for the pairs without a slot."""
    shape = (triton.cdiv(num_pairs, _PAIRS), triton.next_power_of_2(num_slots + 1))
    return torch.zeros(shape, dtype=torch.int32, device=device)


def order_by_slot(
    slots_TK: torch.Tensor, num_slots: int, counts_BS: torch.Tensor, tiles: SlotTiles
) -> None:
    """Fills `tiles` with the pairs, ordered by slot and then by pair number."""
    num_pairs, bins = slots_TK.numel(), counts_BS.shape[1]
    blocks = triton.cdiv(num_pairs, _PAIRS)
    _count_pairs[(blocks,)](
        slots_TK, counts_BS, num_pairs, SLOTS=num_slots, BLOCK_S=bins, PAIRS=_PAIRS, num_warps=4
    )
    _place_blocks[(1,)](
        counts_BS,
        tiles.tiles_C3,
        tiles.num_tiles_1,
        blocks,
        SLOTS=num_slots,
        BLOCK_S=bins,
        AT_ONCE=_BLOCKS_AT_ONCE,
        TILE_ROWS=tiles.rows,
        num_warps=8,
    )
    _order_pairs[(blocks,)](
        slots_TK,
        counts_BS,
        tiles.order_N,
        num_pairs,
        SLOTS=num_slots,
        BLOCK_S=bins,
        PAIRS=_PAIRS,
        num_warps=8,
    )


@triton.jit
def _load_slots(slots_ptr, num_pairs, SLOTS: tl.constexpr, PAIRS: tl.constexpr):
    """(pair numbers, their slots, mask) of a block; SLOTS for a pair without a slot."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    is_pair = pair < num_pairs
    slot = tl.load(slots_ptr + pair, mask=is_pair, other=-1).to(tl.int32)
    return pair, tl.where(slot < 0, SLOTS, slot), is_pair


@triton.jit(do_not_specialize=["num_pairs"])
def _count_pairs(
    slots_ptr,
    counts_ptr,
    num_pairs,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PAIRS: tl.constexpr,
):
    _, slot, is_pair = _load_slots(slots_ptr, num_pairs, SLOTS, PAIRS)
    counts = tl.histogram(slot, BLOCK_S, mask=is_pair)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S), counts)


@triton.jit(do_not_specialize=["blocks"])
def _place_blocks(
    counts_ptr,
    tiles_ptr,
    num_tiles_ptr,
    blocks,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Replaces each count by the place in the order of the first pair that it counts."""
    s = tl.arange(0, BLOCK_S)
    b = tl.arange(0, AT_ONCE)
    totals = tl.zeros([BLOCK_S], dtype=tl.int32)
    for start in range(0, blocks, AT_ONCE):
        at = counts_ptr + (start + b)[:, None] * BLOCK_S + s[None, :]
        totals += tl.sum(tl.load(at, mask=(start + b)[:, None] < blocks, other=0), axis=0)
    place = tl.cumsum(totals, axis=0) - totals
    write_tiles(
        tl.where(s < SLOTS, totals, 0), place, tiles_ptr, num_tiles_ptr, SLOTS, BLOCK_S, TILE_ROWS
    )
    for start in range(0, blocks, AT_ONCE):
        at = counts_ptr + (start + b)[:, None] * BLOCK_S + s[None, :]
        is_block = (start + b)[:, None] < blocks
        counts = tl.load(at, mask=is_block, other=0)
        tl.store(at, place[None, :] + tl.cumsum(counts, axis=0) - counts, mask=is_block)
        place += tl.sum(counts, axis=0)


@triton.jit(do_not_specialize=["num_pairs"])
def _order_pairs(
    slots_ptr,
    places_ptr,
    order_ptr,
    num_pairs,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PAIRS: tl.constexpr,
):
    pair, slot, is_pair = _load_slots(slots_ptr, num_pairs, SLOTS, PAIRS)
    first = tl.load(places_ptr + tl.program_id(0) * BLOCK_S + slot, mask=is_pair, other=0)
    CHUNK: tl.constexpr = 64
    index = tl.zeros([PAIRS], dtype=tl.int32)
    for start in tl.static_range(0, PAIRS, CHUNK):
        other = tl.program_id(0) * PAIRS + start + tl.arange(0, CHUNK)
        theirs = tl.load(slots_ptr + other, mask=other < num_pairs, other=-1).to(tl.int32)
        theirs = tl.where(theirs < 0, SLOTS, theirs)
        is_before = (theirs[None, :] == slot[:, None]) & (other[None, :] < pair[:, None])
        index += tl.sum(is_before.to(tl.int32), axis=1)
    tl.store(order_ptr + first + index, pair, mask=is_pair)
