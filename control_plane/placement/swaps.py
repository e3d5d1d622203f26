"""Improves a packing by exchanging the contents of two slots, one exchange per layer at a time:
first to separate an expert's replicas, then to level the load."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from control_plane.placement.topology import Floats, Ints, RankTopology

LEVEL_ENOUGH = 1.001
LEVEL_UNEVEN = 1.005
PARTNERS = 1


class Packing:
    """Edits `rows` (`[num_layers, num_live, width]` int64, -1 in unused slots) in place. `share` is
    the load per replica and `counts` the replicas, both `[num_layers, num_experts]`."""

    def __init__(self, rows: Ints, share: Floats, counts: Ints, topology: RankTopology) -> None:
        self._rows, self._node = rows, topology.node
        num_layers, num_ranks, width = rows.shape
        num_experts = share.shape[1]
        self._share = np.concatenate(
            (share, np.zeros((num_layers, 1))), axis=1
        )  # [-1] is the load of an unused slot
        layer, rank, slot = np.nonzero(rows >= 0)
        pair = layer * num_experts + rows[layer, rank, slot]
        self._on_rank = _count_pairs(pair, rank, (num_layers, num_experts, num_ranks))
        self._on_node = _count_pairs(
            pair, self._node[rank], (num_layers, num_experts, topology.num_nodes)
        )
        used = np.unique(self._node[np.flatnonzero((rows[0] >= 0).any(axis=1))])
        self._counts, self._num_nodes = counts, max(1, len(used))
        self._node_cap = -(-counts // self._num_nodes)  # an even share of replicas, rounded up
        weights = np.where(rows >= 0, self._share[np.arange(num_layers)[:, None, None], rows], 0.0)
        self._load = weights.sum(axis=2)
        self._slot_rank = np.repeat(np.arange(num_ranks), width)

    def layers_with_duplicates(self) -> Ints:
        return np.flatnonzero((self._on_rank > 1).any(axis=(1, 2)))

    def separate_duplicates(self) -> None:
        """Exchanges until no rank holds an expert twice and no node too many replicas of it, or no
        exchange helps."""
        flat = self._rows.reshape(len(self._rows), -1)
        hopeless = np.zeros(flat.shape, dtype=bool)
        layers = np.arange(len(flat))
        while layers.size:
            crowded = self._crowded(layers, flat[layers]) & ~hopeless[layers]
            left = crowded.any(axis=1)
            layers, slots = layers[left], crowded[left].argmax(axis=1)
            partners, found = self._partners(layers, slots, flat)
            hopeless[layers[~found], slots[~found]] = True
            self._exchange(layers[found], slots[found], partners[found])

    def _crowded(self, layers: Ints, flat: Ints) -> NDArray[np.bool_]:
        """`[len(layers), num_live * width]` bool: whether the slot's expert should be elsewhere."""
        at = layers[:, None]
        twice = self._on_rank[at, flat, self._slot_rank] > 1
        here = self._on_node[at, flat, self._node[self._slot_rank]]
        many = here > self._node_cap[at, flat]
        some = (here > 1) & ~many & (flat >= 0)
        row, slot = np.nonzero(some)
        many[row, slot] = self._misses_nodes(layers[row], flat[row, slot])
        result: NDArray[np.bool_] = (flat >= 0) & (twice | many)
        return result

    def _misses_nodes(self, layers: Ints, experts: Ints) -> NDArray[np.bool_]:
        """Whether the expert's replicas are on fewer nodes than they could be."""
        used = (self._on_node[layers, experts] > 0).sum(axis=-1)
        result: NDArray[np.bool_] = used < np.minimum(
            self._counts[layers, experts], self._num_nodes
        )
        return result

    def _partners(self, layers: Ints, slots: Ints, flat: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """For one slot of each of `layers`: the valid slot of the most similar load to exchange
        with, and whether there is one."""
        at = layers[:, None]
        mine, theirs = flat[layers, slots][:, None], flat[layers]
        my_rank, their_rank = self._slot_rank[slots][:, None], self._slot_rank[None, :]
        my_node, their_node = self._node[my_rank], self._node[their_rank]
        twice = self._on_rank[at, mine, my_rank] > 1
        valid = (theirs >= 0) & (theirs != mine)
        valid &= (self._on_rank[at, mine, their_rank] == 0) & (
            self._on_rank[at, theirs, my_rank] == 0
        )
        on_theirs, on_mine = self._on_node[at, mine, their_node], self._on_node[at, theirs, my_node]
        apart = (on_theirs < self._node_cap[at, mine]) & (on_mine < self._node_cap[at, theirs])
        apart &= (on_theirs == 0) | ~self._misses_nodes(at, mine)
        apart &= (on_mine == 0) | (self._on_node[at, theirs, their_node] > 1)
        valid &= np.where(my_node == their_node, twice, apart)
        gap = np.abs(self._share[at, theirs] - self._share[at, mine])
        gap = np.where(valid, gap, np.inf)
        return gap.argmin(axis=1), valid.any(axis=1)

    def level(self, rounds: int) -> None:
        """Exchanges between the busiest rank and the idlest. If that does not help, tries the next
        idlest, and so on while the layer is uneven."""
        mean, num_ranks = self._load.mean(axis=1), self._load.shape[1]
        if self._rows.shape[2] < 2:
            return  # with one slot per rank, an exchange only swaps the loads of two ranks
        layers, skip = np.arange(len(self._rows)), np.zeros(len(self._rows), dtype=np.int64)
        for _ in range(rounds):
            peak = self._load[layers].max(axis=1) / mean[layers]
            going = peak > np.where(skip > 0, LEVEL_UNEVEN, LEVEL_ENOUGH)
            going &= skip < num_ranks - 1
            layers, skip = layers[going], skip[going]
            if layers.size == 0:
                return
            order = np.argsort(self._load[layers], axis=1, kind="stable")
            others = np.minimum(skip[:, None] + np.arange(PARTNERS), num_ranks - 2)
            others = np.take_along_axis(order, others, axis=1)
            first, second, found = self._best_exchange(layers, order[:, -1], others)
            self._exchange(layers[found], first[found], second[found])
            skip = np.where(found, 0, skip + PARTNERS)

    def _best_exchange(
        self, layers: Ints, busy: Ints, others: Ints
    ) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """The slot of the `busy` rank and the slot of one of `others` (`[len(layers), k]`) after
        whose exchange the busier of the two ranks has the least load, and whether any exchange
        helps."""
        width = self._rows.shape[2]
        at = layers[:, None]
        mine = self._rows[layers, busy]
        theirs = self._rows[at, others].reshape(layers.size, -1)
        target = np.repeat(others, width, axis=1)
        gap = (self._load[layers, busy][:, None] - self._load[at, target])[:, None, :]
        moved = self._share[at, mine][:, :, None] - self._share[at, theirs][:, None, :]
        valid = (moved > 1e-6 * gap) & (moved < gap * (1 - 1e-6))
        i_may = self._may_move(
            at[:, :, None], mine[:, :, None], busy[:, None, None], others[:, None, :]
        )
        valid &= np.repeat(i_may, width, axis=2)
        valid &= self._may_move(at, theirs, target, busy[:, None])[:, None, :]
        gain = np.where(valid, np.minimum(moved, gap - moved), 0.0).reshape(layers.size, -1)
        best = gain.argmax(axis=1)
        found = gain[np.arange(layers.size), best] > 0
        mine_at, their_at = best // theirs.shape[1], best % theirs.shape[1]
        second = target[np.arange(layers.size), their_at] * width + their_at % width
        return busy * width + mine_at, second, found

    def _may_move(self, at: Ints, experts: Ints, source: Ints, target: Ints) -> NDArray[np.bool_]:
        """Whether an expert may move from rank `source` to rank `target`, so that no rank holds it
        twice and no node too many of it. The arguments broadcast."""
        here, there = self._node[source], self._node[target]
        on_here, on_there = self._on_node[at, experts, here], self._on_node[at, experts, there]
        limit = np.maximum(self._node_cap[at, experts], on_here)
        result: NDArray[np.bool_] = (
            (experts >= 0)
            & (self._on_rank[at, experts, target] == 0)
            & ((here == there) | ((on_there < limit) & ((on_here > 1) | (on_there == 0))))
        )
        return result

    def _exchange(self, layers: Ints, first: Ints, second: Ints) -> None:
        """Slots are numbered `rank * width + slot`; at most one exchange per layer."""
        flat = self._rows.reshape(len(self._rows), -1)
        a, b = flat[layers, first], flat[layers, second]
        flat[layers, first], flat[layers, second] = b, a
        rank_a, rank_b = self._slot_rank[first], self._slot_rank[second]
        for expert, source, target in ((a, rank_a, rank_b), (b, rank_b, rank_a)):
            self._on_rank[layers, expert, source] -= 1
            self._on_rank[layers, expert, target] += 1
            self._on_node[layers, expert, self._node[source]] -= 1
            self._on_node[layers, expert, self._node[target]] += 1
            self._load[layers, source] -= self._share[layers, expert]
            self._load[layers, target] += self._share[layers, expert]


def _count_pairs(pair: Ints, place: Ints, shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """Of `shape` int16: how often each `place` occurs with each (layer, expert) pair."""
    size = shape[0] * shape[1] * shape[2]
    return np.bincount(pair * shape[2] + place, minlength=size).astype(np.int16).reshape(shape)
