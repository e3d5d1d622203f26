"""The map after a death. No replica of a survivor moves. Orphans go into empty slots, then into
slots of surplus replicas, such that the most that one survivor must load is as little as
possible."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from control_plane.placement.load_balance import balance_orphan_loads
from control_plane.placement.orphan_placement import OrphanPlacement
from control_plane.placement.results import LayerExpert, Loads, ShrinkResult, SlotFill
from control_plane.placement.topology import (
    Floats,
    Ints,
    loads_or_even,
    rank_loads,
    replica_counts,
)
from shared.expert_map import ExpertMap, Placement
from shared.types import ABSENT_SLOT, EMPTY_SLOT, ExpertId, RankId, SlotId


class _Refilled(NamedTuple):
    placement: Placement
    uncoverable: tuple[LayerExpert, ...]


def shrink(
    expert_map: ExpertMap,
    dead: Collection[RankId],
    loads: Loads | None = None,
    *,
    unproven: Collection[RankId] = (),
) -> ShrinkResult:
    """`loads` is `[num_layers, num_experts]`; None means even load. `unproven` are survivors that
    have not been seen to step yet: they get orphans only if the others have no slots for all of
    them. Raises ValueError if no rank survives."""
    alive = np.array(sorted({m.rank for m in expert_map.members} - set(dead)), dtype=np.int64)
    if alive.size == 0:
        raise ValueError("no rank survives: a fresh placement is needed, not a smaller one")
    placement = without_ranks(expert_map.placement, alive)
    weights = loads_or_even(loads, expert_map.num_layers, expert_map.num_experts)
    counts = replica_counts(placement, expert_map.num_experts)
    refilled = _Refilled(placement, ())
    if (counts == 0).any():
        proven = np.setdiff1d(alive, list(unproven))
        refilled = _refilled(placement, proven if proven.size else alive, counts, weights)
        if refilled.uncoverable and 0 < proven.size < alive.size:
            refilled = _refilled(placement, alive, counts, weights)
    after = refilled.placement
    slot_fills = tuple(
        SlotFill(layer, RankId(rank), SlotId(slot), ExpertId(int(after[layer, rank, slot])))
        for layer, rank, slot in np.argwhere(after != placement).tolist()
    )
    return ShrinkResult(placement, slot_fills, after, refilled.uncoverable)


def _refilled(placement: Placement, ranks: Ints, counts: Ints, weights: Floats) -> _Refilled:
    """With the orphans in slots of `ranks`, the only ones that change. `counts` are those of all
    survivors; a replica is surplus only if another of `ranks` has one."""
    held = placement[:, ranks]
    rows = held.copy()
    own_counts = np.maximum(replica_counts(held, counts.shape[1]), counts > 0)
    uncoverable = _place_orphans(rows, own_counts, weights)
    balance_orphan_loads(held, rows, counts.shape[1])
    result = placement.copy()
    result[:, ranks] = rows
    return _Refilled(result, uncoverable)


def _place_orphans(rows: Placement, counts: Ints, weights: Floats) -> tuple[LayerExpert, ...]:
    """Puts orphans into `rows` (`[num_layers, num_survivors, slots_per_rank]`), layer by layer. In
    each layer, a survivor's target is what it would have to load so far if all loaded equally.
    Returns the orphans for which there is no slot, the least loaded first."""
    per_rank = rank_loads(rows, weights)
    covered = np.minimum((rows > ABSENT_SLOT).sum(axis=(1, 2)), counts.shape[1])
    to_load = np.cumsum(covered - (counts > 0).sum(axis=1))
    num_loaded = [0] * rows.shape[1]
    unplaced: list[tuple[float, LayerExpert]] = []
    for layer in np.flatnonzero((counts == 0).any(axis=1)).tolist():
        orphans = np.flatnonzero(counts[layer] == 0)
        ordered = orphans[np.argsort(-weights[layer, orphans], kind="stable")].tolist()
        num_loaded_target = -(-int(to_load[layer]) // rows.shape[1])
        placements = OrphanPlacement(
            rows[layer],
            counts[layer],
            weights[layer],
            per_rank[layer],
            num_loaded,
            num_loaded_target,
        )
        for expert in ordered[placements.fill(ordered) :]:
            pair = LayerExpert(layer, ExpertId(expert))
            unplaced.append((float(weights[layer, expert]), pair))
    return tuple(pair for _, pair in sorted(unplaced))


def without_ranks(placement: Placement, alive: Ints) -> Placement:
    """A copy in which the slots of all ranks but `alive` are empty."""
    result = placement.copy()
    gone = np.setdiff1d(np.arange(placement.shape[1]), alive)
    result[:, gone] = np.minimum(result[:, gone], EMPTY_SLOT)
    return result
