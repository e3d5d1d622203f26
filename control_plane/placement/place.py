"""A fresh placement: replica counts, then packing, for a cluster without a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from control_plane.placement.packing import pack
from control_plane.placement.replica_counts import choose_counts
from control_plane.placement.results import LayerExpert, Loads, PlacementPlan
from control_plane.placement.topology import (
    Floats,
    RankTopology,
    checked_loads,
    empty_placement,
    fill_quotas,
)
from shared.expert_map import Placement
from shared.types import ExpertId, NodeId, RankId


def place(
    loads: Loads,
    ranks: Sequence[RankId],
    nodes: Mapping[RankId, NodeId],
    slots: Mapping[RankId, int],
    *,
    redundant: int | None = None,
    num_ranks: int | None = None,
    survive: int = 0,
) -> PlacementPlan:
    """Fills `num_experts + redundant` slots of each layer (all of them where None) and leaves the
    others spare, for the orphans of a death. `num_ranks` rows, or as many as the largest rank
    needs. `survive` rank failures without reload are bought at any cost in balance, as far as
    slots go; without it second copies are given as far as balance hardly suffers.
    Raises ValueError on malformed input."""
    if loads.ndim != 2 or 0 in loads.shape:
        raise ValueError("loads must be [num_layers, num_experts], neither of them zero")
    if (redundant is not None and redundant < 0) or survive < 0:
        raise ValueError("redundant and survive must not be negative")
    num_layers, num_experts = loads.shape
    weights = checked_loads(loads, num_layers, num_experts)
    topology = RankTopology.of(ranks, nodes, slots)
    rows = int(topology.ranks[-1]) + 1 if num_ranks is None else num_ranks
    if rows <= topology.ranks[-1]:
        raise ValueError(f"num_ranks is {rows}, but rank {topology.ranks[-1]} takes part")
    placement = empty_placement(topology, num_layers, rows, int(topology.slots.max()))
    quotas = fill_quotas(topology, num_experts, redundant)
    if quotas.max() > 0:
        counts = choose_counts(weights, topology, quotas, survive)
        chosen = pack(weights, counts, topology, quotas).astype(np.int16)
        region = placement[:, topology.ranks, : chosen.shape[2]]
        placement[:, topology.ranks, : chosen.shape[2]] = np.where(chosen >= 0, chosen, region)
    return PlacementPlan(placement, _outside(placement, weights))


def _outside(placement: Placement, loads: Floats) -> tuple[LayerExpert, ...]:
    """The experts without a slot, coldest first."""
    inside = np.zeros((loads.shape[0], loads.shape[1] + 1), dtype=bool)
    inside[np.arange(len(placement))[:, None, None], placement.clip(min=-1)] = True
    layer, expert = np.nonzero(~inside[:, :-1])
    order = np.lexsort((expert, layer, loads[layer, expert]))
    return tuple(LayerExpert(int(layer[i]), ExpertId(int(expert[i]))) for i in order)
