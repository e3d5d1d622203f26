"""Turns router scores into work: expert groups and top-k, the slots of the chosen experts, and the
tiles of rows that each slot computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.exchange.replica_policy import NO_SLOT as NO_SLOT

_CHUNK = 256
_FIXED_POINT = tl.constexpr(2.0**40)
_COMPARISONS = 4_096  # per block, over 8 warps: the fastest as measured


class SlotTiles(NamedTuple):
    """Work for the expert kernels, all int32. `order_N` holds pair numbers. A tile is (slot, first,
    count): it computes the pairs `order_N[first : first + count]` with the weights of its slot. The
    first `num_tiles_1[0]` of `tiles_C3` count. `rows` bounds the count of a tile."""

    order_N: torch.Tensor
    tiles_C3: torch.Tensor
    num_tiles_1: torch.Tensor
    rows: int


class Choice(NamedTuple):
    """The inputs of a choice by softmax among all experts. `slot_of_UE` holds each expert's slot;
    only the first turn counts."""

    scores_TE: torch.Tensor
    slot_of_UE: torch.Tensor
    position_T: torch.Tensor
    normalise: bool
    factor: float


def new_slot_tiles(num_pairs: int, num_slots: int, rows: int, device: torch.device) -> SlotTiles:
    tiles = min(num_pairs, num_slots + num_pairs // rows)
    return SlotTiles(
        order_N=torch.zeros(num_pairs, dtype=torch.int32, device=device),
        tiles_C3=torch.zeros(tiles, 3, dtype=torch.int32, device=device),
        num_tiles_1=torch.zeros(1, dtype=torch.int32, device=device),
        rows=rows,
    )


def score_choices(
    scores_TE: torch.Tensor,
    correction_E: torch.Tensor | None,
    choices_TE: torch.Tensor,
    *,
    sigmoid: bool,
    num_groups: int,
    topk_group: int,
) -> None:
    """Writes the values by which experts are chosen to `choices_TE`.

    They are the scores, or with `sigmoid` the sigmoids of the scores, plus the correction if there
    is one. Experts outside the `topk_group` best groups get -inf. A group counts by its best
    expert, or with `sigmoid` by the sum of its two best.
    """
    rows, experts = scores_TE.shape
    size = experts // num_groups
    _score_choices[(rows,)](
        scores_TE,
        scores_TE if correction_E is None else correction_E,
        choices_TE,
        SIZE=size,
        GROUPS=num_groups,
        TOPK_GROUP=topk_group,
        BLOCK_G=triton.next_power_of_2(num_groups),
        BLOCK_S=triton.next_power_of_2(size),
        SIGMOID=sigmoid,
        CORRECTED=correction_E is not None,
        num_warps=4,
    )


def choose_slots(
    scores_TE: torch.Tensor,
    choices_TE: torch.Tensor,
    slot_of_UE: torch.Tensor,
    position_T: torch.Tensor,
    slots_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    normalise: bool,
    sigmoid: bool = False,
    factor: float = 1.0,
    chosen_E: torch.Tensor | None = None,
) -> None:
    """Chooses the k experts with the largest choices; of equal ones, those with the lowest ids.

    Writes their slots by `slot_of_UE`, in which row t takes turn t modulo U, and their weights:
    `factor` times the softmax over all experts, or with `sigmoid` the sigmoid of the scores. With
    `normalise`, the chosen weights sum to one before `factor`. Rows without a token (position -1)
    get NO_SLOT; the others are added to `chosen_E` (int32), if it is given."""
    rows, experts = scores_TE.shape
    _choose_slots[(rows,)](
        scores_TE,
        choices_TE,
        slot_of_UE,
        position_T,
        slots_TK,
        weights_TK,
        position_T if chosen_E is None else chosen_E,
        factor,
        TURNS=slot_of_UE.numel() // experts,
        COUNTED=chosen_E is not None,
        EXPERTS=experts,
        BLOCK_E=triton.next_power_of_2(experts),
        CHUNK=comparisons_at_once(experts),
        TOP_K=slots_TK.shape[1],
        NORMALISE=normalise,
        SIGMOID=sigmoid,
        num_warps=8,
    )


def comparisons_at_once(experts: int) -> int:
    """How many other experts each expert is compared with at a time."""
    block = int(triton.next_power_of_2(experts))
    return max(16, min(_COMPARISONS // block, block))


def group_by_slot(slots_TK: torch.Tensor, num_slots: int, tiles: SlotTiles) -> None:
    """Fills `tiles` with the pairs, ordered by slot and then by pair number."""
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
        CHUNK=min(_CHUNK, triton.next_power_of_2(rows * top_k)),
        num_warps=4,
    )


def fill_padded_tiles(
    counts_S: torch.Tensor,
    rows_of_slot: int,
    tiles: SlotTiles,
    computed_1: torch.Tensor | None = None,
) -> None:
    """Fills `tiles` for rows padded by slot: slot s has `counts_S[s]` rows from `s · rows_of_slot`
    on. Adds their number to `computed_1` (int32), if it is given."""
    num_slots = counts_S.shape[0]
    _fill_padded_tiles[(1,)](
        counts_S,
        tiles.tiles_C3,
        tiles.num_tiles_1,
        counts_S if computed_1 is None else computed_1,
        COUNTED=computed_1 is not None,
        SLOTS=num_slots,
        BLOCK_S=triton.next_power_of_2(num_slots),
        ROWS_OF_SLOT=rows_of_slot,
        TILE_ROWS=tiles.rows,
        num_warps=4,
    )


@triton.jit
def _num_before(theirs, own, their_id, own_id):
    """For each of our values, how many of theirs come before it (int32): the larger ones, and of
    the equal ones those with the lower id."""
    before = (theirs[None, :] > own[:, None]) | (
        (theirs[None, :] == own[:, None]) & (their_id[None, :] < own_id[:, None])
    )
    return tl.sum(before.to(tl.int32), axis=1)


@triton.jit
def _score_choices(
    scores_ptr,
    correction_ptr,
    choices_ptr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
):
    row = tl.program_id(0)
    g = tl.arange(0, BLOCK_G)
    s = tl.arange(0, BLOCK_S)
    e = g[:, None] * SIZE + s[None, :]
    mask = (g[:, None] < GROUPS) & (s[None, :] < SIZE)
    choice = tl.load(scores_ptr + row * (GROUPS * SIZE) + e, mask=mask, other=float("-inf"))
    if SIGMOID:
        choice = tl.where(mask, 1.0 / (1.0 + tl.exp(-choice)), float("-inf"))
    if CORRECTED:
        choice += tl.load(correction_ptr + e, mask=mask, other=0.0)
    if TOPK_GROUP < GROUPS:
        best = tl.max(choice, axis=1)
        value = best
        if SIGMOID:
            is_best = choice == best[:, None]
            below = tl.max(tl.where(is_best, float("-inf"), choice), axis=1)
            value = best + tl.where(tl.sum(is_best.to(tl.int32), axis=1) > 1, best, below)
        index = _num_before(value, value, g, g)
        choice = tl.where(index[:, None] < TOPK_GROUP, choice, float("-inf"))
    tl.store(choices_ptr + row * (GROUPS * SIZE) + e, choice, mask=mask)


@triton.jit
def ranked(choices_ptr, choice, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr):
    """The number of experts that come before each expert; EXPERTS for padding. This needs no search
    for one maximum after the other. `choice` holds the values at `choices_ptr`."""
    e = tl.arange(0, BLOCK_E)
    index = tl.zeros([BLOCK_E], dtype=tl.int32)
    for start in tl.static_range(0, EXPERTS, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = tl.load(choices_ptr + other, mask=other < EXPERTS, other=float("-inf"))
        index += _num_before(theirs, choice, other, e)
    return tl.where(e < EXPERTS, index, EXPERTS)


@triton.jit
def _sum_of_shares(share):
    """The sum of numbers up to 1, the largest of which is far above 2⁻⁴⁰. It adds integers, so the
    order and the number of threads do not matter."""
    return tl.sum((share * _FIXED_POINT).to(tl.int64), axis=0).to(tl.float32) / _FIXED_POINT


@triton.jit
def softmax_weights(scores, is_chosen, factor, NORMALISE: tl.constexpr):
    """The weights of all experts; the `scores` of padding must be -inf."""
    weight = tl.exp(scores - tl.max(scores, axis=0))
    weight = weight / _sum_of_shares(weight)
    if NORMALISE:
        weight = weight / (_sum_of_shares(tl.where(is_chosen, weight, 0.0)) + 1e-20)
    return weight * factor


@triton.jit
def _choose_slots(
    scores_ptr,
    choices_ptr,
    slot_of_ptr,
    position_ptr,
    slots_ptr,
    weights_ptr,
    chosen_ptr,
    factor,
    TURNS: tl.constexpr,
    COUNTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    row = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    is_expert = e < EXPERTS
    slot = tl.load(slot_of_ptr + (row % TURNS) * EXPERTS + e, mask=is_expert, other=-1)
    row_ptr = choices_ptr + row * EXPERTS
    choice = tl.load(row_ptr + e, mask=is_expert, other=float("-inf"))
    scores = tl.load(scores_ptr + row * EXPERTS + e, mask=is_expert, other=float("-inf"))
    is_token = tl.load(position_ptr + row) >= 0
    index = ranked(row_ptr, choice, EXPERTS, BLOCK_E, CHUNK)
    is_chosen = index < TOP_K
    if SIGMOID:
        weight = tl.where(is_expert, 1.0 / (1.0 + tl.exp(-scores)), 0.0)
        if NORMALISE:
            # As in the published code: keeps the divisor above zero if all weights vanish.
            weight = weight / (tl.sum(tl.where(is_chosen, weight, 0.0), axis=0) + 1e-20)
        weight = weight * factor
    else:
        weight = softmax_weights(scores, is_chosen, factor, NORMALISE)
    slot = tl.where(is_token, slot, -1).to(slots_ptr.dtype.element_ty)
    tl.store(slots_ptr + row * TOP_K + index, slot, mask=is_chosen)
    tl.store(weights_ptr + row * TOP_K + index, weight, mask=is_chosen)
    if COUNTED:
        one = tl.where(is_chosen & is_token, 1, 0)
        tl.atomic_add(chosen_ptr + e, one, mask=is_chosen, sem="relaxed")


@triton.jit
def write_tiles(
    counts,
    first_rows,
    tiles_ptr,
    num_tiles_ptr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    s = tl.arange(0, BLOCK_S)
    num_tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    first_tile = tl.cumsum(num_tiles, axis=0) - num_tiles
    for i in range(tl.max(num_tiles, axis=0)):
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
    CHUNK: tl.constexpr,
):
    """Program t finds the index of token t's pairs in the order. One more program counts the pairs
    per slot and writes the tiles."""
    row = tl.program_id(0)
    n = tl.arange(0, CHUNK)
    if row * TOP_K < num_pairs:
        k = tl.arange(0, BLOCK_K)
        pair = row * TOP_K + k
        mine = tl.load(slots_ptr + pair, mask=k < TOP_K, other=-1).to(tl.int32)
        mine = tl.where(mine < 0, SLOTS, mine)
        index = tl.zeros([BLOCK_K], dtype=tl.int32)
        for start in range(0, num_pairs, CHUNK):
            at = start + n
            slot = tl.load(slots_ptr + at, mask=at < num_pairs, other=SLOTS + 1).to(tl.int32)
            slot = tl.where(slot < 0, SLOTS, slot)
            before = (slot[None, :] < mine[:, None]) | (
                (slot[None, :] == mine[:, None]) & (at[None, :] < pair[:, None])
            )
            index += tl.sum(before.to(tl.int32), axis=1)
        tl.store(order_ptr + index, pair, mask=k < TOP_K)
    else:
        counts = tl.zeros([BLOCK_S], dtype=tl.int32)
        for start in range(0, num_pairs, CHUNK):
            at = start + n
            slot = tl.load(slots_ptr + at, mask=at < num_pairs, other=-1).to(tl.int32)
            counts += tl.histogram(tl.maximum(slot, 0), BLOCK_S, mask=slot >= 0)
        first_rows = tl.cumsum(counts, axis=0) - counts
        write_tiles(counts, first_rows, tiles_ptr, num_tiles_ptr, SLOTS, BLOCK_S, TILE_ROWS)


@triton.jit
def _fill_padded_tiles(
    counts_ptr,
    tiles_ptr,
    num_tiles_ptr,
    computed_ptr,
    COUNTED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS_OF_SLOT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    s = tl.arange(0, BLOCK_S)
    counts = tl.load(counts_ptr + s, mask=s < SLOTS, other=0).to(tl.int32)
    if COUNTED:
        tl.store(computed_ptr, tl.load(computed_ptr) + tl.sum(counts, axis=0))
    write_tiles(
        counts,
        s * ROWS_OF_SLOT,
        tiles_ptr,
        num_tiles_ptr,
        SLOTS,
        BLOCK_S,
        TILE_ROWS,
    )
