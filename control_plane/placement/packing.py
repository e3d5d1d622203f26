"""Assigns replicas to ranks for all layers at once: in rounds over the ranks, hottest first, then
by exchanges that separate duplicates and level the load. Counts and quotas are given.

The task is that of EPLB's `balanced_packing`: put weighted items into packs of fixed size, so that
the heaviest pack is light. `_deal_singly` is that rule: the heaviest item first, to the lightest
pack with space (the longest-processing-time rule, Graham 1969). `_deal` and the exchanges are ours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from control_plane.placement.greedy_layer import place_layer
from control_plane.placement.swaps import Packing
from control_plane.placement.topology import Floats, Ints, RankTopology

REFINE_ROUNDS = 96


def pack(loads: Floats, counts: Ints, topology: RankTopology, quotas: Ints) -> Ints:
    """`[num_layers, num_live, max(quotas)]` int64: the expert of each slot, -1 beyond a rank's
    quota. `loads` and `counts` are `[num_layers, num_experts]`, `quotas` is `[num_live]`; each row
    of `counts` sums to the sum of `quotas`. No rank holds an expert twice, and nodes share an
    expert's replicas evenly, as far as their slots permit."""
    share = loads / np.maximum(counts, 1)
    single = bool((counts <= 1).all())
    rows = _deal_singly(share, counts, quotas) if single else _deal(share, counts, topology, quotas)
    packing = Packing(rows, share, counts, topology)
    packing.separate_duplicates()
    packing.level(REFINE_ROUNDS)
    for layer in packing.layers_with_duplicates():
        chosen = place_layer(loads[layer], counts[layer], topology, quotas)
        rows[layer] = -1
        for rank, experts in enumerate(chosen):
            rows[layer, rank, : len(experts)] = experts
    return rows


def _deal(share: Floats, counts: Ints, topology: RankTopology, quotas: Ints) -> Ints:
    """Replicas sorted by share, so that those of an expert are neighbours. Each round visits the
    nodes in turn and each rank once, so it gives neighbours to different ranks, and to different
    nodes if there are enough."""
    num_layers, num_ranks = len(share), len(quotas)
    order = np.argsort(-share, axis=1, kind="stable")
    repeats = np.take_along_axis(counts, order, axis=1).ravel()
    items = np.repeat(order.ravel(), repeats).reshape(num_layers, int(quotas.sum()))
    weights = np.take_along_axis(share, items, axis=1)
    rows = np.full((num_layers, num_ranks, int(quotas.max())), -1, dtype=np.int64)
    load = np.zeros((num_layers, num_ranks))
    at, start = np.arange(num_layers)[:, None], 0
    for slot in range(int(quotas.max())):
        ranks = _visiting_order(load, topology, quotas > slot)
        end = start + ranks.shape[1]
        if slot % 2:
            ranks = np.roll(
                ranks, -1, axis=1
            )  # otherwise pairs of ranks would hold the same experts
        rows[at, ranks, slot] = items[:, start:end]
        load[at, ranks] += weights[:, start:end]
        start = end
    return rows


def _deal_singly(share: Floats, counts: Ints, quotas: Ints) -> Ints:
    """For counts of at most 1: repeatedly the hottest remaining expert to the idlest rank with a
    slot."""
    num_layers, total = len(share), int(quotas.sum())
    order = np.argsort(np.where(counts > 0, -share, np.inf), axis=1, kind="stable")[:, :total]
    rows = np.full((num_layers, len(quotas), int(quotas.max())), -1, dtype=np.int64)
    load = np.where(quotas > 0, np.zeros((num_layers, 1)), np.inf)
    taken = np.zeros((num_layers, len(quotas)), dtype=np.int64)
    at = np.arange(num_layers)
    weights = np.take_along_axis(share, order, axis=1)
    for item in range(total):
        rank = load.argmin(axis=1)
        rows[at, rank, taken[at, rank]] = order[:, item]
        taken[at, rank] += 1
        load[at, rank] += weights[:, item]
        load[at, rank] = np.where(taken[at, rank] < quotas[rank], load[at, rank], np.inf)
    return rows


def _visiting_order(load: Floats, topology: RankTopology, takes_part: NDArray[np.bool_]) -> Ints:
    """`[num_layers, num_taking_part]`: the idlest rank of each node, then the second idlest of
    each, and so on, with the idlest nodes first."""
    num_layers = len(load)
    grid = _node_grid(topology, takes_part)
    num_nodes, width = grid.shape
    loads = np.where(grid >= 0, load[:, grid], np.inf)
    by_load = np.argsort(loads, axis=2, kind="stable")
    ranks = np.take_along_axis(np.broadcast_to(grid, loads.shape), by_load, axis=2)
    totals = np.where(np.isfinite(loads), loads, 0.0).sum(axis=2)
    nodes = np.argsort(totals, axis=1, kind="stable")
    ranks = np.take_along_axis(ranks, nodes[:, :, None], axis=1)
    flat = ranks.transpose(0, 2, 1).reshape(num_layers, num_nodes * width)
    count = int(takes_part.sum())
    if count < num_nodes * width:
        real_first = np.argsort(flat < 0, axis=1, kind="stable")[:, :count]
        flat = np.take_along_axis(flat, real_first, axis=1)
    return flat


def _node_grid(topology: RankTopology, takes_part: NDArray[np.bool_]) -> Ints:
    """`[num_nodes, most ranks of a node]`: the ranks of each node, padded with -1."""
    members = [np.flatnonzero(takes_part & (topology.node == n)) for n in range(topology.num_nodes)]
    members = [m for m in members if m.size]
    grid = np.full((len(members), max(m.size for m in members)), -1, dtype=np.int64)
    for node, ranks in enumerate(members):
        grid[node, : ranks.size] = ranks
    return grid
