"""One layer of a live map while it is repaired: which rank holds what, which slots may be emptied,
and how balanced the ranks would be after a change. It decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from control_plane.placement.topology import Floats, Ints, RankTopology

IDLEST_RANKS = 6


class LayerTarget(NamedTuple):
    """What a layer should reach: the number of `filled` slots, and `num_replicas_min` replicas of
    each expert on distinct ranks, of which `shortfall` in all may be missing, because hot experts
    need those slots. `tolerance`: the busiest rank may carry 1 + tolerance times the mean load."""

    filled: int
    num_replicas_min: int
    shortfall: int
    tolerance: float


class LayerState:
    """Ranks are indices of live ranks, nodes indices into the topology's. `flat` is `[num_live *
    width]` int64: the expert of slot `rank * width + slot`, or EMPTY_SLOT or ABSENT_SLOT.

    The imbalance cost is the sum over ranks of (load / mean)^4. Every choice minimises it, and a
    change for balance must lower it, so repairs cannot repeat themselves. The fourth power (our
    choice) makes the busiest ranks count most, but lets changes on others count too.
    """

    def __init__(
        self, rows: Ints, loads: Floats, topology: RankTopology, target: LayerTarget
    ) -> None:
        num_ranks, width = rows.shape
        self.flat = rows.reshape(-1).copy()
        self.rank = np.repeat(np.arange(num_ranks), width)
        self.loads, self.node, self.target = loads, topology.node, target
        self.num_nodes, self.width = topology.num_nodes, width
        self.mean = loads.sum() / num_ranks
        self.recount()

    def recount(self) -> None:
        num_experts, num_ranks = len(self.loads), len(self.node)
        filled = np.flatnonzero(self.flat >= 0)
        pair = self.flat[filled] * num_ranks + self.rank[filled]
        holds = np.bincount(pair, minlength=num_experts * num_ranks)
        self.holds = holds.reshape(num_experts, num_ranks)
        pair = self.flat[filled] * self.num_nodes + self.node[self.rank[filled]]
        on_node = np.bincount(pair, minlength=num_experts * self.num_nodes)
        self.on_node = on_node.reshape(num_experts, self.num_nodes)
        self.counts = self.holds.sum(axis=1)
        self.num_ranks = (self.holds > 0).sum(axis=1)
        self.nodes_of = (self.on_node > 0).sum(axis=1)
        self.share = self.loads / np.maximum(self.counts, 1)
        self.load = self.share @ self.holds

    def fill(self, slots: Sequence[int], experts: Sequence[int]) -> None:
        """Puts each expert into its slot; -1 empties the slot."""
        self.flat[list(slots)] = experts
        self.recount()

    def lacking(self) -> Ints:
        """`[num_experts]`: how many replicas on distinct ranks each expert lacks."""
        result: Ints = np.maximum(self.target.num_replicas_min - self.num_ranks, 0)
        return result

    def may_lack_more(self) -> bool:
        return int(self.lacking().sum()) < self.target.shortfall

    def nodes_wanted(self) -> int:
        return max(2, self.target.num_replicas_min)

    def nodes_possible(self) -> Ints:
        result: Ints = np.minimum(np.minimum(self.num_ranks, self.num_nodes), self.nodes_wanted())
        return result

    def open_slots(self) -> Ints:
        """The empty slots, if fewer slots are filled than the target says; else none."""
        if (self.flat >= 0).sum() >= self.target.filled:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.flat == -1)

    def lacks(self, slots: Ints, expert: int) -> Ints:
        result: Ints = slots[self.holds[expert, self.rank[slots]] == 0]
        return result

    def surplus(self, least: int) -> Ints:
        """Slots that may be emptied: without the slot, their expert is on `least` distinct ranks or
        more, and on as many nodes as those ranks allow."""
        slots = np.flatnonzero(self.flat >= 0)
        experts, rank = self.flat[slots], self.rank[slots]
        twice = self.holds[experts, rank] > 1
        ranks_left = self.num_ranks[experts] - ~twice
        nodes_left = self.nodes_of[experts] - (self.on_node[experts, self.node[rank]] == 1)
        could = np.minimum(np.minimum(ranks_left, self.num_nodes), self.nodes_wanted())
        keeps = nodes_left >= np.minimum(could, self.nodes_of[experts])
        result: Ints = slots[twice | ((ranks_left >= least) & keeps)]
        return result

    def keeps_nodes(self, expert: int, source: int, target: int) -> bool:
        nodes = self.node[[source, target]]
        return bool(self.keeps_nodes_each(np.array(expert), nodes[:1], nodes[1:])[0])

    def keeps_nodes_each(self, experts: Ints, source: Ints, target: Ints) -> NDArray[np.bool_]:
        """Whether a replica may move from node `source` to node `target` without reducing the nodes
        of its expert below what is wanted. The arguments broadcast."""
        now = self.nodes_of[experts]
        after = now - (self.on_node[experts, source] == 1) + (self.on_node[experts, target] == 0)
        after = np.where(source == target, now, after)
        result: NDArray[np.bool_] = after >= np.minimum(now, self.nodes_wanted())
        return result

    def idlest(self) -> Ints:
        return np.argsort(self.load, kind="stable")[:IDLEST_RANKS]

    def held_by_busiest(self) -> list[int]:
        experts = self.flat[self.rank == self.load.argmax()]
        return [int(e) for e in experts if e >= 0]

    def after(self, slots: Ints, expert: int | None) -> Floats:
        """`[len(slots), num_live]` float64: the ranks' loads if one of `slots` were given to
        `expert` (None: emptied), a row for each slot."""
        at, rank = np.arange(slots.size), self.rank[slots]
        result: Floats = np.repeat(self.load[None], slots.size, axis=0)
        held = np.flatnonzero(self.flat[slots] >= 0)
        evicted = self.flat[slots[held]]
        left = self.counts[evicted] - 1
        inherit = self.loads[evicted] / np.maximum(left, 1)
        holds = self.holds[evicted].astype(np.float64)
        result[held] -= holds * self.share[evicted][:, None]
        holds[np.arange(held.size), rank[held]] -= 1
        result[held] += holds * inherit[:, None]
        if expert is not None:
            share = self.loads[expert] / (self.counts[expert] + 1)
            result += self.holds[expert] * (share - self.share[expert])
            result[at, rank] += share
        return result

    def imbalance_cost(self, load: Floats) -> Floats:
        scale = self.mean if self.mean > 0 else 1.0
        result: Floats = ((load / scale) ** 4).sum(axis=1)
        return result
