"""EPLB, implemented from the description in its README: replicate the heaviest experts and pack
them into equal packs, over all ranks or node by node. A baseline for `benchmarks.placement`, not
for serving."""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

NUM_GROUPS = 8  # DeepSeek V3's expert groups, which the hierarchical policy keeps on one node

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Grouping(Enum):
    GLOBAL = "global"
    HIERARCHICAL = "hierarchical"


def eplb(
    loads: Floats, num_ranks: int, num_nodes: int, slots_per_rank: int, grouping: Grouping
) -> NDArray[np.int16]:
    """int16 `[num_layers, num_ranks, slots_per_rank]`. As described, hierarchical falls back on
    global if groups or ranks do not divide by nodes."""
    divides = NUM_GROUPS % num_nodes == 0 and num_ranks % num_nodes == 0
    if grouping is Grouping.GLOBAL or not divides:
        return np.stack([_layer(row, num_ranks, slots_per_rank) for row in loads]).astype(np.int16)
    result = np.empty((len(loads), num_ranks, slots_per_rank), dtype=np.int16)
    per_node = num_ranks // num_nodes
    size = loads.shape[1] // NUM_GROUPS
    for layer, row in enumerate(loads):
        pack_of = _pack(row.reshape(NUM_GROUPS, size).sum(axis=1), num_nodes)
        for node in range(num_nodes):
            groups = np.flatnonzero(pack_of == node)
            experts = (groups[:, None] * size + np.arange(size)).ravel()
            chosen = experts[_layer(row[experts], per_node, slots_per_rank)]
            result[layer, node * per_node : (node + 1) * per_node] = chosen
    return result


def _layer(loads: Floats, num_ranks: int, slots_per_rank: int) -> Ints:
    counts = _replicate(loads, num_ranks * slots_per_rank)
    items = np.repeat(np.arange(len(loads)), counts)
    pack_of = _pack((loads / counts)[items], num_ranks)
    return items[np.argsort(pack_of, kind="stable")].reshape(num_ranks, slots_per_rank)


def _replicate(loads: Floats, total: int) -> Ints:
    """One replica of each expert, then one more of the expert with most load for each replica,
    until `total` are assigned."""
    counts = np.ones(len(loads), dtype=np.int64)
    for _ in range(total - len(loads)):
        counts[np.argmax(loads / counts)] += 1
    return counts


def _pack(weights: Floats, num_packs: int) -> Ints:
    """Packs of equal size: the heaviest item left goes to the lightest pack with space."""
    size = len(weights) // num_packs
    load, filled = np.zeros(num_packs), np.zeros(num_packs, dtype=np.int64)
    result = np.empty(len(weights), dtype=np.int64)
    for item in np.argsort(-weights, kind="stable"):
        pack = int(np.argmin(np.where(filled < size, load, np.inf)))
        result[item] = pack
        load[pack] += weights[item]
        filled[pack] += 1
    return result
