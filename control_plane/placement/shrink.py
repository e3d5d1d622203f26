"""The map after a death: no survivor's slot moves; orphans go to empty slots, then to those of
surplus replicas."""

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
    per_rank = rank_loads(placement, weights)
    refilled = placement.copy()
    refills: list[Refill] = []
    uncoverable: list[tuple[float, LayerExpert]] = []
    for layer in np.flatnonzero((counts == 0).any(axis=1)):
        orphans = np.flatnonzero(counts[layer] == 0)
        orphans = orphans[np.argsort(-weights[layer, orphans], kind="stable")]
        rows = _LayerSlots(refilled[layer], alive, counts[layer], weights[layer], per_rank[layer])
        for expert in orphans:
            found = rows.take(int(expert))
            if found is None:
                pair = LayerExpert(int(layer), ExpertId(int(expert)))
                uncoverable.append((float(weights[layer, expert]), pair))
            else:
                rank, slot = found
                refills.append(
                    Refill(int(layer), RankId(rank), SlotId(slot), ExpertId(int(expert)))
                )
    return ShrinkResult(
        placement, tuple(refills), refilled, tuple(pair for _, pair in sorted(uncoverable))
    )


def without_ranks(placement: Placement, alive: Ints) -> Placement:
    """A copy in which only the rows of `alive` hold anything."""
    result = placement.copy()
    gone = np.setdiff1d(np.arange(placement.shape[1]), alive)
    result[:, gone] = np.minimum(result[:, gone], EMPTY_SLOT)
    return result


class _LayerSlots:
    """One layer's slots while orphans are put into them. Edits the arrays that it is given."""

    def __init__(
        self, rows: Placement, alive: Ints, counts: Ints, loads: Floats, per_rank: Floats
    ) -> None:
        self._rows, self._counts, self._loads, self._per_rank = rows, counts, loads, per_rank
        index, self._slots = np.nonzero(rows[alive] > ABSENT_SLOT)
        self._ranks = alive[index]

    def take(self, expert: int) -> tuple[int, int] | None:
        """Puts `expert` into the best slot there is, or returns None."""
        held = self._rows[self._ranks, self._slots]
        choice = self._empty(held)
        if choice is None:
            choice = self._surplus(held)
        if choice is None:
            return None
        rank, slot = int(self._ranks[choice]), int(self._slots[choice])
        self._rows[rank, slot] = expert
        self._evict(int(held[choice]), rank)
        self._counts[expert] = 1
        self._per_rank[rank] += self._loads[expert]
        return rank, slot

    def _empty(self, held: Placement) -> int | None:
        """On the least loaded rank."""
        free = np.flatnonzero(held == EMPTY_SLOT)
        if free.size == 0:
            return None
        return int(free[np.argmin(self._per_rank[self._ranks[free]])])

    def _surplus(self, held: Placement) -> int | None:
        """The slot that is missed least: of an expert with three replicas or more before one with
        two, then of the one whose other replicas inherit least, then on the idlest rank."""
        taken = np.flatnonzero(held >= 0)
        counts = self._counts[held[taken]]
        taken, counts = taken[counts > 1], counts[counts > 1]
        if taken.size == 0:
            return None
        inherit = self._loads[held[taken]] / (counts * (counts - 1))
        order = np.lexsort((self._per_rank[self._ranks[taken]], inherit, counts == 2))
        return int(taken[order[0]])

    def _evict(self, expert: int, rank: int) -> None:
        if expert < 0:
            return
        count = int(self._counts[expert])
        self._per_rank[rank] -= self._loads[expert] / count
        self._counts[expert] = count - 1
        others = np.nonzero(self._rows == expert)[0]
        np.add.at(self._per_rank, others, self._loads[expert] / (count * (count - 1)))
