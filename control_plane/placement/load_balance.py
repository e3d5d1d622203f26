"""Minimises the largest number of experts that one survivor must load, by moving loads between
ranks. `orphan_placement` chooses the slots that this starts from.

A *move* takes one layer's orphan from a giver to a taker: from an empty slot to an empty slot. If
the layer has no empty slot left, it goes from a surplus slot to a surplus slot: then the giver
keeps its replica, and the taker's is overwritten. Moves in a *chain* (a to b, b to c) relieve a and
burden only c. These are augmenting paths, as in bipartite matching and maximum flow. If no chain
leads from the ranks that load most to one that loads at least two fewer, then all ranks that they
can reach load as many or one fewer, and no other rank can take any of those loads: a lower maximum
is impossible.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from control_plane.placement.topology import Ints, replica_counts
from shared.expert_map import Placement
from shared.types import EMPTY_SLOT

Bools = NDArray[np.bool_]


class _Move(NamedTuple):
    layer: int
    giver: int
    from_slot: int
    taker: int
    to_slot: int


def balance_orphan_loads(held: Placement, refilled: Placement, num_experts: int) -> None:
    """Edits `refilled` in place. It and `held` are `[num_layers, num_survivors, slots_per_rank]`
    int16 and differ in the slots to load: empty ones, and surplus ones in layers without empty
    ones."""
    num_loaded: Ints = (refilled != held).sum(axis=(0, 2))
    least = -(-int(num_loaded.sum()) // len(num_loaded))
    if num_loaded.max() <= least:
        return
    placements = _LoadPlacements(held, refilled, num_experts)
    while num_loaded.max() > least:
        chain = _chain(placements, num_loaded)
        if not chain:
            return
        # Choose all moves before applying any: in a shortest chain they do not conflict.
        for move in [placements.move(giver, taker) for giver, taker in pairwise(chain)]:
            placements.apply(move)
        num_loaded[chain[0]] -= 1
        num_loaded[chain[-1]] += 1


def _chain(placements: _LoadPlacements, num_loaded: Ints) -> list[int]:
    """The shortest chain (by breadth-first search) from a rank that loads most to one that loads at
    least two fewer, or an empty list."""
    most = int(num_loaded.max())
    queue = np.flatnonzero(num_loaded == most).tolist()
    before = dict.fromkeys(queue, -1)
    for rank in queue:
        for taker in np.flatnonzero(placements.takers(rank)).tolist():
            if taker in before:
                continue
            before[taker] = rank
            queue.append(taker)
            if num_loaded[taker] <= most - 2:
                chain = [taker]
                while before[chain[-1]] >= 0:
                    chain.append(before[chain[-1]])
                return chain[::-1]
    return []


class _LoadPlacements:
    """Which ranks can give and take which layers' loads. Edits `refilled` in place."""

    def __init__(self, held: Placement, refilled: Placement, num_experts: int) -> None:
        self._held, self._rows = held, refilled
        self._counts = replica_counts(refilled, num_experts)
        num_layers, num_ranks, _ = held.shape
        self._movable: Bools = np.zeros(held.shape, dtype=np.bool_)
        self._open: Bools = np.zeros(held.shape, dtype=np.bool_)
        self._takes: Bools = np.zeros((num_layers, num_ranks), dtype=np.bool_)
        self._holder = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._refresh(np.arange(num_layers))

    def takers(self, giver: int) -> Bools:
        """`[num_ranks]`: whether a move from `giver` to the rank is possible."""
        movable = self._movable[:, giver]
        result: Bools = np.logical_or.reduce(self._takes[movable.any(axis=1)])
        layers, slots = np.nonzero(movable & (self._held[:, giver] >= 0))
        back = self._held[layers, giver, slots]
        # An expert's only replica may be overwritten if the giver keeps another for it.
        only = self._counts[layers, back] == 1
        result[self._holder[layers[only], back[only]]] = True
        result[giver] = False
        return result

    def move(self, giver: int, taker: int) -> _Move:
        """Of all possible moves, the first that leaves most experts with a second replica."""
        layers, slots = np.nonzero(self._movable[:, giver])
        back = self._held[layers, giver, slots].astype(np.int64)[:, None]
        gone = self._rows[layers, taker].astype(np.int64)
        same = (gone == back) & (back >= 0)
        counts = np.take_along_axis(self._counts[layers], np.maximum(gone, 0), axis=1)
        back_counts = np.take_along_axis(self._counts[layers], np.maximum(back, 0), axis=1)
        cost = ((gone >= 0) & (counts == 2)).astype(np.int64) - ((back >= 0) & (back_counts == 1))
        cost[same] = 0
        cost[~(self._open[layers, taker] | same)] = np.iinfo(np.int64).max
        choice, to_slot = divmod(int(cost.argmin()), cost.shape[1])
        return _Move(int(layers[choice]), giver, int(slots[choice]), taker, to_slot)

    def apply(self, move: _Move) -> None:
        layer, giver, from_slot, taker, to_slot = move
        orphan, gone = self._rows[layer, giver, from_slot], self._rows[layer, taker, to_slot]
        back = self._held[layer, giver, from_slot]
        self._rows[layer, taker, to_slot] = orphan
        self._rows[layer, giver, from_slot] = back
        if back >= 0:
            self._counts[layer, back] += 1
            self._counts[layer, gone] -= 1
        self._refresh(np.array([layer]))

    def _refresh(self, layers: Ints) -> None:
        rows, held = self._rows[layers], self._held[layers]
        loaded, empty = rows != held, rows == EMPTY_SLOT
        has_empty = empty.any(axis=(1, 2))[:, None, None]
        index = layers[:, None, None]
        surplus = (rows >= 0) & ~loaded & (self._counts[index, np.maximum(rows, 0)] > 1)
        self._movable[layers] = loaded & (has_empty | (held >= 0))
        self._open[layers] = np.where(has_empty, empty, surplus)
        self._takes[layers] = self._open[layers].any(axis=2)
        layer, rank, slot = np.nonzero(rows >= 0)
        self._holder[layers[layer], rows[layer, rank, slot]] = rank
