"""Small safe steps from the present map to one that holds every expert, spreads its replicas over
nodes, and balances the load, in this order."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from control_plane.placement.layer_repair import SlotChange, next_change, urgency
from control_plane.placement.layer_state import LayerState, LayerTarget
from control_plane.placement.replica_counts import choose_counts, cover_floor
from control_plane.placement.results import HealStep, Loads, SlotFill
from control_plane.placement.shrink import without_ranks
from control_plane.placement.topology import Ints, RankTopology, fill_quotas, loads_or_even
from shared.expert_map import ExpertMap, Placement
from shared.types import EMPTY_SLOT, ExpertId, NodeId, RankId, SlotId


def heal(
    expert_map: ExpertMap,
    loads: Loads | None,
    nodes: Mapping[RankId, NodeId],
    *,
    budget_bytes: int,
    bytes_per_expert: int,
    redundant: int | None = None,
    survive: int = 0,
    tolerance: float = 0.05,
) -> Iterator[HealStep]:
    """Yields steps that load at most `budget_bytes` of weights each, but at least one expert. (An
    exchange between two full ranks loads two.) `bytes_per_expert` is 0 for a dense model.

    The iterator is lazy: take the first step, perform it, and call `heal` again with the new map,
    which continues from there. `loads` is `[num_layers, num_experts]`; None means even load. It
    ends when nothing is worth a move: every expert has the replicas that `redundant` and `survive`
    ask for (see `place`), and in each layer the busiest rank's load is at most (1 + `tolerance`)
    times the mean, or no single change lowers the imbalance cost (see `LayerState`). Raises
    ValueError if `bytes_per_expert` is negative.
    """
    if bytes_per_expert < 0:
        raise ValueError("bytes_per_expert must not be negative")
    members = np.array(sorted(m.rank for m in expert_map.members), dtype=np.int64)
    placement = without_ranks(expert_map.placement, members)
    topology = RankTopology.of_map(expert_map, nodes)
    weights = loads_or_even(loads, expert_map.num_layers, expert_map.num_experts)
    quotas = fill_quotas(topology, expert_map.num_experts, redundant)
    least = cover_floor(expert_map.num_experts, quotas, survive)
    counts = choose_counts(weights, topology, quotas, survive)
    shortfall = np.maximum(least - counts, 0).sum(axis=1)
    layers = [
        LayerState(
            placement[layer][members].astype(np.int64),
            weights[layer],
            topology,
            LayerTarget(int(quotas.sum()), least, int(shortfall[layer]), tolerance),
        )
        for layer in range(expert_map.num_layers)
    ]
    num_loads_max = max(1, budget_bytes // max(1, bytes_per_expert))
    while changes := _gather(layers, num_loads_max):
        step = _step(placement, members, changes, bytes_per_expert)
        placement = step.placement.copy()
        yield step


def _gather(layers: list[LayerState], num_loads_max: int) -> list[tuple[int, SlotChange]]:
    """The changes of one step as (layer, change), the layer with the most urgent need first;
    applies them to `layers`. No slot changes twice, and every expert keeps a replica that the step
    does not touch."""
    result: list[tuple[int, SlotChange]] = []
    left = num_loads_max
    kept = [layer.flat.copy() for layer in layers]  # -1 once emptied, loads not counted
    touched = [np.zeros(layer.flat.shape, dtype=bool) for layer in layers]
    needs = [(urgency(layer), index) for index, layer in enumerate(layers)]
    queue = [(need, index) for need, index in needs if need is not None]
    heapq.heapify(queue)
    while queue and left > 0:
        _, index = heapq.heappop(queue)
        layer = layers[index]
        change = next_change(layer, left)
        if change is None or not _is_safe(change, kept[index], touched[index]):
            continue
        left -= change.num_loads
        touched[index][list(change.slots)] = True
        kept[index][list(change.slots)] = -1
        layer.fill(change.slots, change.experts)
        result.append((index, change))
        need = urgency(layer)
        if need is not None:
            heapq.heappush(queue, (need, index))
    return result


def _is_safe(change: SlotChange, kept: Ints, touched: NDArray[np.bool_]) -> bool:
    slots = list(change.slots)
    if touched[slots].any():
        return False
    for expert in kept[slots]:
        emptied = int((kept[slots] == expert).sum())
        if expert >= 0 and int((kept == expert).sum()) <= emptied:
            return False
    return True


def _step(
    before: Placement,
    members: Ints,
    changes: list[tuple[int, SlotChange]],
    bytes_per_expert: int,
) -> HealStep:
    emptied, after = before.copy(), before.copy()
    width = before.shape[2]
    slot_fills = []
    for layer, change in changes:
        for place, expert in zip(change.slots, change.experts, strict=True):
            rank, slot = int(members[place // width]), place % width
            emptied[layer, rank, slot] = EMPTY_SLOT
            after[layer, rank, slot] = expert
            if expert >= 0:
                slot_fills.append(SlotFill(layer, RankId(rank), SlotId(slot), ExpertId(expert)))
    return HealStep(
        emptied, tuple(slot_fills), after, len(slot_fills) * bytes_per_expert, changes[0][1].reason
    )
