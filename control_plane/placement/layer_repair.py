"""The next change that improves one layer of a live map. Each is small and safe by itself; `heal`
combines those of all layers into steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from control_plane.placement.layer_state import LayerState
from control_plane.placement.results import HealReason
from control_plane.placement.topology import Ints

GAIN_MIN = 0.002


class SlotChange(NamedTuple):
    """Slots, numbered `rank * width + slot`, and their new experts; -1 empties a slot. `gain` is
    the decrease of the imbalance cost (see `LayerState`), 0 for changes with another reason."""

    reason: HealReason
    gain: float
    slots: tuple[int, ...]
    experts: tuple[int, ...]

    @property
    def num_loads(self) -> int:
        return sum(expert >= 0 for expert in self.experts)


def urgency(layer: LayerState) -> tuple[int, float] | None:
    """A sort key, most urgent first: the kind of the layer's greatest need (0 is the most urgent),
    and minus its peak load over the mean. None if the layer needs nothing. Cheap, because it does
    not check whether the need can be met."""
    peak = float(layer.load.max() / layer.mean) if layer.mean > 0 else 1.0
    filled = int((layer.flat >= 0).sum())
    needs = (
        bool((layer.counts == 0).any()),
        int(layer.lacking().sum()) > layer.target.shortfall
        or bool((layer.nodes_of < layer.nodes_possible()).any()),
        filled > layer.target.filled,
        filled < layer.target.filled,
        peak > 1 + layer.target.tolerance,
    )
    return (needs.index(True), -peak) if any(needs) else None


def next_change(layer: LayerState, budget_loads: int) -> SlotChange | None:
    """The most urgent change that the layer needs and that is possible, or None."""
    return (
        _cover(layer)
        or _replicate(layer)
        or _release_surplus(layer)
        or _spread(layer, budget_loads)
        or _fill(layer)
        or _balance(layer, budget_loads)
    )


def _cover(layer: LayerState) -> SlotChange | None:
    missing = np.flatnonzero(layer.counts == 0)
    if missing.size == 0:
        return None
    expert = int(missing[np.argmax(layer.loads[missing])])
    slots = np.flatnonzero(layer.flat == -1)
    if slots.size == 0:
        slots = layer.surplus(least=1)
    return _best_load(layer, "cover", expert, slots)


def _replicate(layer: LayerState) -> SlotChange | None:
    lacking = layer.lacking()
    if lacking.sum() <= layer.target.shortfall:
        return None
    order = np.lexsort((-layer.loads, -lacking))
    for expert in order[: int((lacking > 0).sum())]:
        slots = layer.open_slots()
        if slots.size == 0:
            slots = np.concatenate(
                (layer.surplus(layer.target.num_replicas_min), np.flatnonzero(layer.flat == -1))
            )
        change = _best_load(layer, "spread", int(expert), layer.lacks(slots, int(expert)))
        if change is not None:
            return change
    return None


def _spread(layer: LayerState, budget_loads: int) -> SlotChange | None:
    """If an expert's replicas are on fewer nodes than possible, gives it one on another node."""
    for expert in np.flatnonzero(layer.nodes_of < layer.nodes_possible()):
        slots = np.concatenate(
            (np.flatnonzero(layer.flat == -1), layer.surplus(layer.target.num_replicas_min))
        )
        slots = layer.lacks(slots, int(expert))
        slots = slots[layer.on_node[expert, layer.node[layer.rank[slots]]] == 0]
        change = _best_load(layer, "spread", int(expert), slots)
        if change is None and budget_loads >= 2:
            change = _swap_to_new_node(layer, int(expert))
        if change is not None:
            return change
    return None


def _release_surplus(layer: LayerState) -> SlotChange | None:
    """If more slots are filled than the target says, empties one with a surplus replica. This is
    the second half of a move, so experts with several replicas on one node come first."""
    if (layer.flat >= 0).sum() <= layer.target.filled:
        return None
    slots = layer.surplus(1 if layer.may_lack_more() else layer.target.num_replicas_min)
    if slots.size == 0:
        return None
    together = (layer.nodes_of < layer.nodes_possible())[layer.flat[slots]]
    slots = slots[together] if together.any() else slots
    costs = layer.imbalance_cost(layer.after(slots, None))
    best = int(costs.argmin())
    return SlotChange("spare", 0.0, (int(slots[best]),), (-1,))


def _fill(layer: LayerState) -> SlotChange | None:
    """If fewer slots are filled than the target says, adds a replica: of an expert that lacks one,
    or of the one with the most load per replica."""
    slots = layer.open_slots()
    if slots.size == 0:
        return None
    key = layer.share + np.where(layer.lacking() > 0, layer.loads.sum() + 1.0, 0.0)
    for expert in np.argsort(-key, kind="stable"):
        if layer.counts[expert] == 0 or layer.num_ranks[expert] == len(layer.node):
            continue
        change = _best_load(layer, "redundancy", int(expert), layer.lacks(slots, int(expert)))
        if change is not None:
            return change
    return None


def _balance(layer: LayerState, budget_loads: int) -> SlotChange | None:
    now = float(layer.imbalance_cost(layer.load[None])[0])
    if layer.mean <= 0 or layer.load.max() <= layer.mean * (1 + layer.target.tolerance):
        return None
    found = [_replace(layer, now), _move(layer, now)]
    if budget_loads >= 2:
        found.append(_swap(layer, now))
    good = [c for c in found if c is not None and c.gain > GAIN_MIN * len(layer.node)]
    return max(good, key=lambda c: c.gain / c.num_loads, default=None)


def _replace(layer: LayerState, now: float) -> SlotChange | None:
    """Replaces a surplus replica on an idle rank by one of an expert that the busiest rank
    holds."""
    idlest = layer.idlest()
    spared, any_second = (
        slots[np.isin(layer.rank[slots], idlest)]
        for slots in (layer.surplus(layer.target.num_replicas_min), layer.surplus(1))
    )
    may_lack, lacking = layer.may_lack_more(), layer.lacking()
    best: SlotChange | None = None
    for expert in layer.held_by_busiest():
        surplus = any_second if may_lack or lacking[expert] else spared
        change = _best_load(layer, "balance", expert, layer.lacks(surplus, expert), now)
        if change is not None and (best is None or change.gain > best.gain):
            best = change
    return best


def _move(layer: LayerState, now: float) -> SlotChange | None:
    """Copies an expert of the busiest rank into an empty slot of an idle rank. Its old slot is
    emptied by a later change."""
    busiest, idlest = int(layer.load.argmax()), layer.idlest()
    empty = np.flatnonzero(layer.flat == -1)
    empty = empty[np.isin(layer.rank[empty], idlest)]
    pairs = [
        (slot, expert)
        for expert in layer.held_by_busiest()
        for slot in layer.lacks(empty, expert)
        if layer.keeps_nodes(expert, busiest, int(layer.rank[slot]))
    ]
    if not pairs:
        return None
    slots = np.array([slot for slot, _ in pairs])
    moved = layer.share[[expert for _, expert in pairs]]
    after = np.repeat(layer.load[None], len(pairs), axis=0)
    after[:, busiest] -= moved
    after[np.arange(len(pairs)), layer.rank[slots]] += moved
    costs = layer.imbalance_cost(after)
    best = int(costs.argmin())
    return SlotChange("balance", now - float(costs[best]), (int(slots[best]),), (pairs[best][1],))


def _swap(layer: LayerState, now: float) -> SlotChange | None:
    """Exchanges an expert of the busiest rank with one of another rank. Both experts have other
    replicas, which serve meanwhile."""
    busiest = int(layer.load.argmax())
    mine = np.flatnonzero((layer.rank == busiest) & (layer.flat >= 0))
    mine = mine[layer.counts[layer.flat[mine]] > 1]
    others = np.flatnonzero((layer.rank != busiest) & (layer.flat >= 0))
    others = others[layer.counts[layer.flat[others]] > 1]
    if mine.size == 0 or others.size == 0:
        return None
    a, b = layer.flat[mine][:, None], layer.flat[others][None, :]
    rank = layer.rank[others]
    moved = layer.share[a] - layer.share[b]
    target = layer.load[rank][None, :]
    valid = (moved > 0) & (layer.holds[a, rank[None]] == 0) & (layer.holds[b, busiest] == 0)
    valid &= layer.keeps_nodes_each(a, layer.node[busiest], layer.node[rank][None])
    valid &= layer.keeps_nodes_each(b, layer.node[rank][None], layer.node[busiest])
    peak = layer.load[busiest]
    before = (peak / layer.mean) ** 4 + (target / layer.mean) ** 4
    after = ((peak - moved) / layer.mean) ** 4 + ((target + moved) / layer.mean) ** 4
    gain = np.where(valid, before - after, -np.inf)
    i, j = np.unravel_index(int(gain.argmax()), gain.shape)
    if not np.isfinite(gain[i, j]):
        return None
    experts = (int(b[0, j]), int(a[i, 0]))
    return SlotChange("balance", float(gain[i, j]), (int(mine[i]), int(others[j])), experts)


def _swap_to_new_node(layer: LayerState, expert: int) -> SlotChange | None:
    """Exchanges one of the expert's replicas with a replica on a node without the expert."""
    crowded = layer.on_node[expert] > 1
    mine = np.flatnonzero((layer.flat == expert) & crowded[layer.node[layer.rank]])
    others = np.flatnonzero((layer.flat >= 0) & (layer.holds[expert, layer.rank] == 0))
    others = others[layer.on_node[expert, layer.node[layer.rank[others]]] == 0]
    others = others[layer.counts[layer.flat[others]] > 1]
    if mine.size == 0 or others.size == 0:
        return None
    rank, theirs = layer.rank[mine][:, None], layer.flat[others][None, :]
    target = layer.rank[others][None, :]
    valid = layer.holds[theirs, rank] == 0
    valid &= layer.keeps_nodes_each(theirs, layer.node[target], layer.node[rank])
    moved = layer.share[expert] - layer.share[theirs]
    after = np.maximum(layer.load[rank] - moved, layer.load[target] + moved)
    key = np.where(valid, after, np.inf)
    i, j = np.unravel_index(int(key.argmin()), key.shape)
    if not np.isfinite(key[i, j]):
        return None
    return SlotChange("spread", 0.0, (int(mine[i]), int(others[j])), (int(theirs[0, j]), expert))


def _best_load(
    layer: LayerState, reason: HealReason, expert: int, slots: Ints, now: float = 0.0
) -> SlotChange | None:
    """The slot of `slots` for `expert` with the least imbalance cost. If the expert should be on
    more nodes, only slots on new nodes count; without any, "balance" is no reason to add a
    replica."""
    if slots.size == 0:
        return None
    possible = min(layer.num_ranks[expert] + 1, layer.num_nodes, layer.nodes_wanted())
    if layer.nodes_of[expert] < possible:
        new_node = layer.on_node[expert, layer.node[layer.rank[slots]]] == 0
        if new_node.any():
            slots = slots[new_node]
        elif reason == "balance":
            return None
    costs = layer.imbalance_cost(layer.after(slots, expert))
    best = int(costs.argmin())
    return SlotChange(reason, now - float(costs[best]), (int(slots[best]),), (expert,))
