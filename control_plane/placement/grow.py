"""What a joiner's slots should hold: first experts that lack replicas, then what it holds already,
then a fair share of the load. No slot of a member changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from control_plane.placement.results import GrowResult, Loads, SlotFill
from control_plane.placement.shrink import without_ranks
from control_plane.placement.topology import (
    Floats,
    Ints,
    RankTopology,
    fill_quotas,
    loads_or_even,
    presence,
)
from shared.expert_map import ExpertMap, Placement
from shared.types import ABSENT_SLOT, EMPTY_SLOT, ExpertId, NodeId, RankId, SlotId

_KEPT_FIRST = 0.99
"""Less than a step of need, and as much as any difference of loads: see `_best`."""


def grow(
    expert_map: ExpertMap,
    joined: Sequence[RankId],
    nodes: Mapping[RankId, NodeId],
    slots: Mapping[RankId, int],
    loads: Loads | None = None,
    *,
    redundant: int | None = None,
    resident: Mapping[RankId, Placement] | None = None,
) -> GrowResult:
    """The map's placement with the joiners' slots filled.

    `nodes` must name the joiners and the members, `slots` the joiners. `loads` is `[num_layers,
    num_experts]`; None means even load. A joiner fills as many slots as it would in a fresh
    placement (`redundant` as in `place`) and keeps the rest spare. `heal` later empties the
    members' replicas that it made superfluous.

    `resident` is what joiners hold already, `[num_layers, slots]` each: one that comes back in its
    process has its former experts. Where several experts are needed equally, it gets those, in the
    slots in which it has them, and `slot_fills` lists only the others. Raises ValueError if a
    joiner is a member."""
    members = np.array(sorted(m.rank for m in expert_map.members), dtype=np.int64)
    joiners = sorted(joined)
    if set(joiners) & {int(r) for r in members}:
        raise ValueError(f"rank {min(set(joiners) & set(members.tolist()))} is a member already")
    exists = (expert_map.placement[0] != ABSENT_SLOT).sum(axis=1)
    all_slots = {RankId(int(r)): int(exists[r]) for r in members} | {r: slots[r] for r in joiners}
    topology = RankTopology.of(list(all_slots), nodes, all_slots)
    placement = _widened_placement(without_ranks(expert_map.placement, members), joiners, slots)
    weights = loads_or_even(loads, expert_map.num_layers, expert_map.num_experts)
    quotas = dict(
        zip(
            topology.ranks.tolist(),
            fill_quotas(topology, expert_map.num_experts, redundant).tolist(),
            strict=True,
        )
    )
    slot_fills: list[SlotFill] = []
    for rank in joiners:
        has = np.full((expert_map.num_layers, slots[rank]), EMPTY_SLOT, dtype=np.int16)
        if resident is not None and rank in resident:
            has = resident[rank][:, : slots[rank]]
        chosen = _choose(placement, weights, topology, rank, quotas[rank], has)
        row = _arranged(chosen, has)
        placement[:, rank, : slots[rank]] = row
        slot_fills += [
            SlotFill(layer, rank, SlotId(slot), ExpertId(int(expert)))
            for (layer, slot), expert in np.ndenumerate(row)
            if expert >= 0 and expert != has[layer, slot]
        ]
    return GrowResult(placement, tuple(slot_fills))


def _widened_placement(
    placement: Placement, joiners: Sequence[RankId], slots: Mapping[RankId, int]
) -> Placement:
    """A copy with rows for the joiners, which are empty."""
    num_layers, num_ranks, width = placement.shape
    num_ranks = max([num_ranks, *(r + 1 for r in joiners)])
    wider = max([width, *(slots[r] for r in joiners)])
    result = np.full((num_layers, num_ranks, wider), ABSENT_SLOT, dtype=np.int16)
    result[:, : placement.shape[1], :width] = placement
    for rank in joiners:
        result[:, rank] = ABSENT_SLOT
        result[:, rank, : slots[rank]] = EMPTY_SLOT
    return result


def _arranged(chosen: Placement, has: Placement) -> Placement:
    """`[num_layers, slots]`: each chosen expert in the slot in which the joiner has it, the others
    in the first slots left."""
    row = np.full(has.shape, EMPTY_SLOT, dtype=np.int16)
    for layer in range(len(has)):
        slot_of = {int(e): slot for slot, e in reversed(list(enumerate(has[layer]))) if e >= 0}
        wanted = [int(e) for e in chosen[layer] if e >= 0]
        for expert in wanted:
            if expert in slot_of:
                row[layer, slot_of[expert]] = expert
        free = np.flatnonzero(row[layer] < 0)
        others = [expert for expert in wanted if expert not in slot_of]
        row[layer, free[: len(others)]] = others
    return row


def _choose(
    placement: Placement,
    loads: Floats,
    topology: RankTopology,
    rank: RankId,
    quota: int,
    has: Placement,
) -> Placement:
    """`[num_layers, quota]` int16: experts for the joiner, which has `has`, chosen slot by slot for
    all layers."""
    num_layers, num_experts = loads.shape
    held = presence(placement[:, topology.ranks], num_experts) > 0
    need = _need(held, topology, topology.ranks.tolist().index(rank))
    counts = held.sum(axis=2).astype(np.int64)
    mean = loads.sum(axis=1) / len(topology.ranks)
    kept = presence(has[:, None], num_experts)[:, :, 0] > 0
    taken = np.zeros((num_layers, num_experts), dtype=bool)
    mine = np.zeros(num_layers)
    result = np.full((num_layers, quota), EMPTY_SLOT, dtype=np.int16)
    layers = np.arange(num_layers)
    for slot in range(quota):
        fair = (mean - mine) / (quota - slot)
        best = _best(need + _KEPT_FIRST * kept, loads, counts, taken, fair)
        fits = ~taken[layers, best]
        result[fits, slot] = best[fits]
        taken[layers, best] = True
        mine += np.where(fits, loads[layers, best] / (counts[layers, best] + 1), 0.0)
    return result


def _need(held: NDArray[np.bool_], topology: RankTopology, joiner: int) -> Ints:
    """`[num_layers, num_experts]`: 3 if no rank holds the expert, 2 if one does, 1 if all replicas
    are on one other node, else 0."""
    on_ranks = held.sum(axis=2)
    ours = topology.node == topology.node[joiner]
    elsewhere = np.zeros(held.shape[:2], dtype=np.int64)
    for node in range(topology.num_nodes):
        elsewhere += held[:, :, topology.node == node].any(axis=2)
    one_foreign_node = (elsewhere == 1) & ~held[:, :, ours].any(axis=2)
    return np.where(on_ranks == 0, 3, np.where(on_ranks == 1, 2, np.where(one_foreign_node, 1, 0)))


def _best(
    need: Floats, loads: Floats, counts: Ints, taken: NDArray[np.bool_], fair: Floats
) -> Ints:
    """`[num_layers]`: the expert with the highest need. Among equals, the one for which load /
    (counts + 1), its share with the joiner's replica, is closest to `fair` (`[num_layers]`), the
    load that each of the joiner's open slots should still take."""
    distance = np.abs(loads / (counts + 1) - fair[:, None])
    scale = distance.max(axis=1, keepdims=True) + 1.0
    key = np.where(taken, np.inf, distance / scale - need)
    result: Ints = key.argmin(axis=1)
    return result
