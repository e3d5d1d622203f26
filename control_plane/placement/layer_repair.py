"""One layer of a live map, and the next change that would better it. Changes are small and safe by
themselves; `heal` gathers those of all layers into steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from control_plane.placement.layout import Floats, Ints, Layout
from control_plane.placement.results import HealReason

GAIN_LEAST = 0.002
IDLEST_RANKS = 6


class Change(NamedTuple):
    """Slots (`rank * width + slot`) and what they shall hold, -1 to empty one."""

    reason: HealReason
    gain: float
    slots: tuple[int, ...]
    experts: tuple[int, ...]

    @property
    def num_loads(self) -> int:
        return sum(expert >= 0 for expert in self.experts)


class LayerTarget(NamedTuple):
    """What a layer should come to: so many slots filled, `replicas_least` of each expert, of which
    `shortfall` may lack (balance needs them for hot experts)."""

    filled: int
    replicas_least: int
    shortfall: int
    tolerance: float


class LayerRepair:
    """Ranks and nodes are live indices; `flat` is `[num_live * width]`: expert, or empty or absent.

    Uneasiness is the sum over ranks of (load / mean) to the fourth: every choice minimises it, and
    a balance change must lower it, so that repairs cannot go in circles.
    """

    def __init__(self, rows: Ints, loads: Floats, layout: Layout, target: LayerTarget) -> None:
        num_ranks, width = rows.shape
        self.flat = rows.reshape(-1).copy()
        self._rank = np.repeat(np.arange(num_ranks), width)
        self._loads, self._node, self._target = loads, layout.node, target
        self._num_nodes, self._width = layout.num_nodes, width
        self._mean = loads.sum() / num_ranks
        self._recount()

    def _recount(self) -> None:
        num_experts, num_ranks = len(self._loads), len(self._node)
        filled = np.flatnonzero(self.flat >= 0)
        pair = self.flat[filled] * num_ranks + self._rank[filled]
        holds = np.bincount(pair, minlength=num_experts * num_ranks)
        self._holds = holds.reshape(num_experts, num_ranks)
        pair = self.flat[filled] * self._num_nodes + self._node[self._rank[filled]]
        on_node = np.bincount(pair, minlength=num_experts * self._num_nodes)
        self._on_node = on_node.reshape(num_experts, self._num_nodes)
        self.counts = self._holds.sum(axis=1)
        self._num_ranks = (self._holds > 0).sum(axis=1)
        self._nodes_of = (self._on_node > 0).sum(axis=1)
        self._share = self._loads / np.maximum(self.counts, 1)
        self._load = self._share @ self._holds

    def apply(self, change: Change) -> None:
        self.flat[list(change.slots)] = change.experts
        self._recount()

    def urgency(self) -> tuple[int, float] | None:
        """What the layer needs most, 0 the most urgent, and minus its peak load over the mean;
        None where all is well. Cheap: whether the need can be met is not asked."""
        peak = float(self._load.max() / self._mean) if self._mean > 0 else 1.0
        filled = int((self.flat >= 0).sum())
        needs = (
            bool((self.counts == 0).any()),
            int(self._lacking().sum()) > self._target.shortfall
            or bool((self._nodes_of < self._nodes_possible()).any()),
            filled > self._target.filled,
            filled < self._target.filled,
            peak > 1 + self._target.tolerance,
        )
        return (needs.index(True), -peak) if any(needs) else None

    def next_change(self, budget_loads: int) -> Change | None:
        """The first kind of change that the layer needs and that is possible, most urgent first."""
        return (
            self._cover()
            or self._replicate()
            or self._give_back()
            or self._spread(budget_loads)
            or self._fill()
            or self._balance(budget_loads)
        )

    # -- what each kind of change does

    def _cover(self) -> Change | None:
        missing = np.flatnonzero(self.counts == 0)
        if missing.size == 0:
            return None
        expert = int(missing[np.argmax(self._loads[missing])])
        slots = np.flatnonzero(self.flat == -1)
        if slots.size == 0:
            slots = self._surplus(least=1)
        return self._best_load("cover", expert, slots)

    def _replicate(self) -> Change | None:
        lacking = self._lacking()
        if lacking.sum() <= self._target.shortfall:
            return None
        order = np.lexsort((-self._loads, -lacking))
        for expert in order[: int((lacking > 0).sum())]:
            slots = self._open_slots()
            if slots.size == 0:
                slots = np.concatenate(
                    (self._surplus(self._target.replicas_least), np.flatnonzero(self.flat == -1))
                )
            change = self._best_load("spread", int(expert), self._lacks(slots, int(expert)))
            if change is not None:
                return change
        return None

    def _spread(self, budget_loads: int) -> Change | None:
        """An expert whose replicas share fewer nodes than they could gets one on another node."""
        for expert in np.flatnonzero(self._nodes_of < self._nodes_possible()):
            slots = np.concatenate(
                (np.flatnonzero(self.flat == -1), self._surplus(self._target.replicas_least))
            )
            slots = self._lacks(slots, int(expert))
            slots = slots[self._on_node[expert, self._node[self._rank[slots]]] == 0]
            change = self._best_load("spread", int(expert), slots)
            if change is None and budget_loads >= 2:
                change = self._swap_to_new_node(int(expert))
            if change is not None:
                return change
        return None

    def _give_back(self) -> Change | None:
        """Empties a surplus slot where more are filled than should be in peace; a move's second
        half, so of doubles on one node first."""
        if (self.flat >= 0).sum() <= self._target.filled:
            return None
        slots = self._surplus(1 if self._may_lack_more() else self._target.replicas_least)
        if slots.size == 0:
            return None
        together = (self._nodes_of < self._nodes_possible())[self.flat[slots]]
        slots = slots[together] if together.any() else slots
        uneasy = self._uneasiness(self._after(slots, None))
        best = int(uneasy.argmin())
        return Change("spare", 0.0, (int(slots[best]),), (-1,))

    def _fill(self) -> Change | None:
        """One more replica while slots are to be filled: of what lacks one, or of the hottest."""
        slots = self._open_slots()
        if slots.size == 0:
            return None
        key = self._share + np.where(self._lacking() > 0, self._loads.sum() + 1.0, 0.0)
        for expert in np.argsort(-key, kind="stable"):
            if self.counts[expert] == 0 or self._num_ranks[expert] == len(self._node):
                continue
            change = self._best_load("redundancy", int(expert), self._lacks(slots, int(expert)))
            if change is not None:
                return change
        return None

    def _balance(self, budget_loads: int) -> Change | None:
        now = float(self._uneasiness(self._load[None])[0])
        if self._mean <= 0 or self._load.max() <= self._mean * (1 + self._target.tolerance):
            return None
        found = [self._replace(now), self._move(now)]
        if budget_loads >= 2:
            found.append(self._swap(now))
        good = [c for c in found if c is not None and c.gain > GAIN_LEAST * len(self._node)]
        return max(good, key=lambda c: c.gain / c.num_loads, default=None)

    # -- candidates of a balance change; the busiest rank is relieved

    def _replace(self, now: float) -> Change | None:
        """One more replica of what the busiest rank holds, in place of a surplus one elsewhere."""
        idlest = self._idlest()
        spared, any_second = (
            slots[np.isin(self._rank[slots], idlest)]
            for slots in (self._surplus(self._target.replicas_least), self._surplus(1))
        )
        may_lack, lacking = self._may_lack_more(), self._lacking()
        best: Change | None = None
        for expert in self._held_by_busiest():
            surplus = any_second if may_lack or lacking[expert] else spared
            change = self._best_load("balance", expert, self._lacks(surplus, expert), now)
            if change is not None and (best is None or change.gain > best.gain):
                best = change
        return best

    def _move(self, now: float) -> Change | None:
        """A replica of the busiest rank goes to an empty slot; its old slot is given back later."""
        busiest, idlest = int(self._load.argmax()), self._idlest()
        empty = np.flatnonzero(self.flat == -1)
        empty = empty[np.isin(self._rank[empty], idlest)]
        pairs = [
            (slot, expert)
            for expert in self._held_by_busiest()
            for slot in self._lacks(empty, expert)
            if self._keeps_nodes(expert, busiest, int(self._rank[slot]))
        ]
        if not pairs:
            return None
        slots = np.array([slot for slot, _ in pairs])
        moved = self._share[[expert for _, expert in pairs]]
        after = np.repeat(self._load[None], len(pairs), axis=0)
        after[:, busiest] -= moved
        after[np.arange(len(pairs)), self._rank[slots]] += moved
        uneasy = self._uneasiness(after)
        best = int(uneasy.argmin())
        return Change("balance", now - float(uneasy[best]), (int(slots[best]),), (pairs[best][1],))

    def _swap(self, now: float) -> Change | None:
        """Two ranks exchange an expert each; both have another replica, which covers meanwhile."""
        busiest = int(self._load.argmax())
        mine = np.flatnonzero((self._rank == busiest) & (self.flat >= 0))
        mine = mine[self.counts[self.flat[mine]] > 1]
        others = np.flatnonzero((self._rank != busiest) & (self.flat >= 0))
        others = others[self.counts[self.flat[others]] > 1]
        if mine.size == 0 or others.size == 0:
            return None
        a, b = self.flat[mine][:, None], self.flat[others][None, :]
        rank = self._rank[others]
        moved = self._share[a] - self._share[b]
        target = self._load[rank][None, :]
        valid = (moved > 0) & (self._holds[a, rank[None]] == 0) & (self._holds[b, busiest] == 0)
        valid &= self._keeps_nodes_each(a, self._node[busiest], self._node[rank][None])
        valid &= self._keeps_nodes_each(b, self._node[rank][None], self._node[busiest])
        peak = self._load[busiest]
        before = (peak / self._mean) ** 4 + (target / self._mean) ** 4
        after = ((peak - moved) / self._mean) ** 4 + ((target + moved) / self._mean) ** 4
        gain = np.where(valid, before - after, -np.inf)
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        if not np.isfinite(gain[i, j]):
            return None
        experts = (int(b[0, j]), int(a[i, 0]))
        return Change("balance", float(gain[i, j]), (int(mine[i]), int(others[j])), experts)

    def _swap_to_new_node(self, expert: int) -> Change | None:
        """Exchanges one of the expert's replicas with a slot of a node that lacks it."""
        crowded = self._on_node[expert] > 1
        mine = np.flatnonzero((self.flat == expert) & crowded[self._node[self._rank]])
        others = np.flatnonzero((self.flat >= 0) & (self._holds[expert, self._rank] == 0))
        others = others[self._on_node[expert, self._node[self._rank[others]]] == 0]
        others = others[self.counts[self.flat[others]] > 1]
        if mine.size == 0 or others.size == 0:
            return None
        rank, theirs = self._rank[mine][:, None], self.flat[others][None, :]
        target = self._rank[others][None, :]
        valid = self._holds[theirs, rank] == 0
        valid &= self._keeps_nodes_each(theirs, self._node[target], self._node[rank])
        moved = self._share[expert] - self._share[theirs]
        after = np.maximum(self._load[rank] - moved, self._load[target] + moved)
        key = np.where(valid, after, np.inf)
        i, j = np.unravel_index(int(key.argmin()), key.shape)
        if not np.isfinite(key[i, j]):
            return None
        return Change("spread", 0.0, (int(mine[i]), int(others[j])), (int(theirs[0, j]), expert))

    # -- what the choices rest on

    def _lacking(self) -> Ints:
        """Replicas on distinct ranks that each expert is short of."""
        result: Ints = np.maximum(self._target.replicas_least - self._num_ranks, 0)
        return result

    def _may_lack_more(self) -> bool:
        return int(self._lacking().sum()) < self._target.shortfall

    def _nodes_wanted(self) -> int:
        return max(2, self._target.replicas_least)

    def _nodes_possible(self) -> Ints:
        result: Ints = np.minimum(
            np.minimum(self._num_ranks, self._num_nodes), self._nodes_wanted()
        )
        return result

    def _open_slots(self) -> Ints:
        """Empty slots, while fewer are filled than should be."""
        if (self.flat >= 0).sum() >= self._target.filled:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.flat == -1)

    def _lacks(self, slots: Ints, expert: int) -> Ints:
        result: Ints = slots[self._holds[expert, self._rank[slots]] == 0]
        return result

    def _surplus(self, least: int) -> Ints:
        """Slots that may be emptied: their expert keeps `least` other replicas on distinct ranks,
        and as many nodes as these could have."""
        slots = np.flatnonzero(self.flat >= 0)
        experts, rank = self.flat[slots], self._rank[slots]
        twice = self._holds[experts, rank] > 1
        ranks_left = self._num_ranks[experts] - ~twice
        nodes_left = self._nodes_of[experts] - (self._on_node[experts, self._node[rank]] == 1)
        could = np.minimum(np.minimum(ranks_left, self._num_nodes), self._nodes_wanted())
        keeps = nodes_left >= np.minimum(could, self._nodes_of[experts])
        result: Ints = slots[twice | ((ranks_left >= least) & keeps)]
        return result

    def _keeps_nodes(self, expert: int, source: int, target: int) -> bool:
        nodes = self._node[[source, target]]
        return bool(self._keeps_nodes_each(np.array(expert), nodes[:1], nodes[1:])[0])

    def _keeps_nodes_each(self, experts: Ints, source: Ints, target: Ints) -> NDArray[np.bool_]:
        """Broadcasting: whether a replica may go from node to node without harm to its spread."""
        now = self._nodes_of[experts]
        after = now - (self._on_node[experts, source] == 1) + (self._on_node[experts, target] == 0)
        after = np.where(source == target, now, after)
        result: NDArray[np.bool_] = after >= np.minimum(now, self._nodes_wanted())
        return result

    def _idlest(self) -> Ints:
        return np.argsort(self._load, kind="stable")[:IDLEST_RANKS]

    def _held_by_busiest(self) -> list[int]:
        experts = self.flat[self._rank == self._load.argmax()]
        return [int(e) for e in experts if e >= 0]

    def _best_load(
        self, reason: HealReason, expert: int, slots: Ints, now: float = 0.0
    ) -> Change | None:
        """The slot of `slots` for `expert` with the least uneasiness, on a node that lacks it if
        it should be on more; balance alone is no reason to put two on one node."""
        if slots.size == 0:
            return None
        possible = min(self._num_ranks[expert] + 1, self._num_nodes, self._nodes_wanted())
        if self._nodes_of[expert] < possible:
            new_node = self._on_node[expert, self._node[self._rank[slots]]] == 0
            if new_node.any():
                slots = slots[new_node]
            elif reason == "balance":
                return None
        uneasy = self._uneasiness(self._after(slots, expert))
        best = int(uneasy.argmin())
        return Change(reason, now - float(uneasy[best]), (int(slots[best]),), (expert,))

    def _after(self, slots: Ints, expert: int | None) -> Floats:
        """`[len(slots), num_live]`: loads when each of `slots` in turn is given to `expert`."""
        at, rank = np.arange(slots.size), self._rank[slots]
        result: Floats = np.repeat(self._load[None], slots.size, axis=0)
        held = np.flatnonzero(self.flat[slots] >= 0)
        evicted = self.flat[slots[held]]
        left = self.counts[evicted] - 1
        inherit = self._loads[evicted] / np.maximum(left, 1)
        holds = self._holds[evicted].astype(np.float64)
        result[held] -= holds * self._share[evicted][:, None]
        holds[np.arange(held.size), rank[held]] -= 1
        result[held] += holds * inherit[:, None]
        if expert is not None:
            share = self._loads[expert] / (self.counts[expert] + 1)
            result += self._holds[expert] * (share - self._share[expert])
            result[at, rank] += share
        return result

    def _uneasiness(self, load: Floats) -> Floats:
        scale = self._mean if self._mean > 0 else 1.0
        result: Floats = ((load / scale) ** 4).sum(axis=1)
        return result
