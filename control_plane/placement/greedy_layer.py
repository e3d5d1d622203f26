"""Places one layer by a greedy rule that works with any mix of slot counts. Slow: `packing` uses it
only for layers in which its exchanges leave an expert twice on one rank."""

from __future__ import annotations

import numpy as np

from control_plane.placement.topology import Floats, Ints, RankTopology


def place_layer(
    loads: Floats, counts: Ints, topology: RankTopology, quotas: Ints
) -> list[list[int]]:
    """The experts of each live rank (in the order of `topology`), none twice on a rank, at most
    `quotas` on each. `loads` and `counts` are `[num_experts]`, `quotas` is `[num_live]`.

    First every expert with a count gets one replica, while there are slots; then the further ones
    follow. Both go hottest first. A replica goes to a node without the expert if there is one, and
    there to the rank with the most slots left among those without the expert. This rule realises
    any counts that can be realised. Slots that are still free get the experts with the most load
    per replica.
    """
    rows: list[list[int]] = [[] for _ in topology.ranks]
    left = quotas.copy()
    per_rank = np.zeros(len(rows))
    holds = np.zeros((len(loads), len(rows)), dtype=bool)
    share = loads / np.maximum(counts, 1)

    def add(expert: int) -> bool:
        open_ranks = np.flatnonzero((left > 0) & ~holds[expert])
        if open_ranks.size == 0:
            return False
        seen = np.isin(topology.node[open_ranks], topology.node[holds[expert]])
        order = np.lexsort((per_rank[open_ranks], -left[open_ranks], seen))
        rank = open_ranks[order[0]]
        holds[expert, rank] = True
        rows[rank].append(expert)
        left[rank] -= 1
        per_rank[rank] += share[expert]
        return True

    hottest_first = np.argsort(-share, kind="stable")
    for expert in hottest_first:
        if counts[expert] > 0:
            add(int(expert))
    for expert in hottest_first:
        for _ in range(int(counts[expert]) - 1):
            add(int(expert))
    while left.sum() > 0:
        candidates = np.flatnonzero((counts > 0) & ~holds[:, left > 0].all(axis=1))
        if candidates.size == 0:
            break
        relief = loads[candidates] / holds[candidates].sum(axis=1)
        add(int(candidates[np.argmax(relief)]))
    return rows
