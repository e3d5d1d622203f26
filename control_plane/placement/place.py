"""A fresh placement, for an instance without a map: replica counts, then packing, like EPLB's
`rebalance_experts`."""

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
    """Fills `num_experts + redundant` slots of each layer and leaves the others spare, for the
    orphans of a death. If `redundant` is None, it fills as many as it can.

    `loads` is `[num_layers, num_experts]`, any real dtype, not negative. `slots` gives the slots
    per layer of each rank. The placement is `[num_layers, num_ranks, slots_per_rank]` int16; if
    `num_ranks` is None, the largest rank decides. As far as the slots suffice, every expert gets
    `survive + 1` replicas, whatever that costs in balance; further second replicas are given only
    if they hardly cost balance. Raises ValueError if the input is malformed."""
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
    """The experts without a slot, those with the least load first."""
    inside = np.zeros((loads.shape[0], loads.shape[1] + 1), dtype=bool)
    inside[np.arange(len(placement))[:, None, None], placement.clip(min=-1)] = True
    layer, expert = np.nonzero(~inside[:, :-1])
    order = np.lexsort((expert, layer, loads[layer, expert]))
    return tuple(LayerExpert(int(layer[i]), ExpertId(int(expert[i]))) for i in order)
