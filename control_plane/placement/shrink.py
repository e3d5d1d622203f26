"""The map after a death: no survivor's slot moves; orphans go to empty slots, then to those of
surplus replicas, so that the survivor that must load most loads as little as it can."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from control_plane.placement.layout import (
    Floats,
    Ints,
    loads_or_even,
    rank_loads,
    replica_counts,
)
from control_plane.placement.load_balance import shorten_longest_load
from control_plane.placement.orphan_placement import OrphanSeats
from control_plane.placement.results import LayerExpert, Loads, Refill, ShrinkResult
from shared.expert_map import ExpertMap, Placement
from shared.types import ABSENT_SLOT, EMPTY_SLOT, ExpertId, RankId, SlotId


def shrink(
    expert_map: ExpertMap, dead: Collection[RankId], loads: Loads | None = None
) -> ShrinkResult:
    """Raises ValueError where nobody survives."""
    alive = np.array(sorted({m.rank for m in expert_map.members} - set(dead)), dtype=np.int64)
    if alive.size == 0:
        raise ValueError("no rank survives: a fresh placement is needed, not a smaller one")
    placement = without_ranks(expert_map.placement, alive)
    weights = loads_or_even(loads, expert_map.num_layers, expert_map.num_experts)
    counts = replica_counts(placement, expert_map.num_experts)
    uncoverable: tuple[LayerExpert, ...] = ()
    refilled = placement.copy()
    if (counts == 0).any():
        held = placement[:, alive]
        rows = held.copy()
        uncoverable = _seat_orphans(rows, counts, weights)
        shorten_longest_load(held, rows, expert_map.num_experts)
        refilled[:, alive] = rows
    refills = tuple(
        Refill(layer, RankId(rank), SlotId(slot), ExpertId(int(refilled[layer, rank, slot])))
        for layer, rank, slot in np.argwhere(refilled != placement).tolist()
    )
    return ShrinkResult(placement, refills, refilled, uncoverable)


def _seat_orphans(rows: Placement, counts: Ints, weights: Floats) -> tuple[LayerExpert, ...]:
    """Puts orphans into `rows` `[num_layers, num_survivors, slots_per_rank]`, layer by layer, at
    the pace of what the survivors had to load by then if all loaded alike. Answers the orphans for
    which there is no slot, coldest first."""
    per_rank = rank_loads(rows, weights)
    covered = np.minimum((rows > ABSENT_SLOT).sum(axis=(1, 2)), counts.shape[1])
    to_load = np.cumsum(covered - (counts > 0).sum(axis=1))
    num_loaded = [0] * rows.shape[1]
    unseated: list[tuple[float, LayerExpert]] = []
    for layer in np.flatnonzero((counts == 0).any(axis=1)).tolist():
        orphans = np.flatnonzero(counts[layer] == 0)
        ordered = orphans[np.argsort(-weights[layer, orphans], kind="stable")].tolist()
        pace = -(-int(to_load[layer]) // rows.shape[1])
        seats = OrphanSeats(
            rows[layer], counts[layer], weights[layer], per_rank[layer], num_loaded, pace
        )
        for expert in ordered[seats.fill(ordered) :]:
            pair = LayerExpert(layer, ExpertId(expert))
            unseated.append((float(weights[layer, expert]), pair))
    return tuple(pair for _, pair in sorted(unseated))


def without_ranks(placement: Placement, alive: Ints) -> Placement:
    """A copy in which only the rows of `alive` hold anything."""
    result = placement.copy()
    gone = np.setdiff1d(np.arange(placement.shape[1]), alive)
    result[:, gone] = np.minimum(result[:, gone], EMPTY_SLOT)
    return result
