"""How many replicas each expert gets: enough for the hot ones to balance the load, then a second
one for all, then the rest for the hottest. All layers at once.

The basis is EPLB's `replicate_experts`: give each further replica to the expert with the largest
load / count. That greedy rule minimises the largest load per replica. The rules that give every
expert a second replica are ours, because EPLB balances only and does not plan for deaths.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from control_plane.placement.topology import Floats, Ints, RankTopology

HOT_SHARES = (np.inf, 1.0, 0.6, 0.35, 0.2)
"""How much of a rank's mean load one replica may carry. The first needs the fewest extra
replicas."""
IMBALANCE_MAX = 0.95
GUARANTEE_COST_MAX = 0.005
"""How much the mean layer's imbalance may grow, as a fraction, to give every expert a second
replica."""
FEW_SLOTS = 4
BISECTIONS = 16


def choose_counts(loads: Floats, topology: RankTopology, quotas: Ints, survive: int) -> Ints:
    """`[num_layers, num_experts]` int64; each row sums to the sum of `quotas` (`[num_live]`).

    If there are slots for two replicas of every expert, and the mean layer's balance hardly
    suffers, every expert gets two. Otherwise a layer takes the first of HOT_SHARES with which a
    balanced packing seems possible, or one as balanced as with counts chosen by load alone. Every
    expert gets `survive + 1` replicas as far as the slots suffice, whatever that costs. With fewer
    slots than experts, the coldest experts get none.
    """
    total, cap = int(quotas.sum()), int((quotas > 0).sum())
    num_experts = loads.shape[1]
    if total <= num_experts:
        counts = np.zeros(loads.shape, dtype=np.int64)
        hottest = np.argsort(-loads, axis=1, kind="stable")[:, :total]
        np.put_along_axis(counts, hottest, 1, axis=1)
        return counts
    floor = min(survive + 1, cap, total // num_experts)
    most = max(2, min(cap, total // num_experts))
    counts = _covering(loads, np.inf, floor, most, total, cap)
    imbalance = estimate_imbalance(loads, counts, topology, quotas)
    open_layers = np.flatnonzero(imbalance > IMBALANCE_MAX)
    if total >= 2 * num_experts and _costs_little(imbalance, np.ones_like(imbalance)):
        return counts
    least = np.full((open_layers.size, num_experts), floor, dtype=np.int64)
    load_only_counts = spread_out(loads[open_layers], least, total, cap)
    limit = np.full_like(imbalance, IMBALANCE_MAX)
    limit[open_layers] = estimate_imbalance(loads[open_layers], load_only_counts, topology, quotas)
    if total >= 2 * num_experts:
        twice = counts if most == 2 else _covering(loads, np.inf, floor, 2, total, cap)
        if _costs_little(estimate_imbalance(loads, twice, topology, quotas), limit):
            return twice
    counts[open_layers] = load_only_counts
    limit = np.maximum(IMBALANCE_MAX, limit[open_layers])
    for level, share in product(sorted({most, max(2, most - 1), 2}, reverse=True), HOT_SHARES):
        if open_layers.size == 0:
            break
        wanted = _covering(loads[open_layers], share, floor, level, total, cap)
        good = estimate_imbalance(loads[open_layers], wanted, topology, quotas) <= limit
        counts[open_layers[good]] = wanted[good]
        open_layers, limit = open_layers[~good], limit[~good]
    return counts


def _costs_little(imbalance: Floats, reference: Floats) -> bool:
    """Whether all layers together take at most 1 + GUARANTEE_COST_MAX times as long as with the
    reference. A layer's time is its imbalance, at least 1."""
    cost = np.maximum(imbalance, 1.0).sum() / np.maximum(reference, 1.0).sum()
    return bool(cost <= 1.0 + GUARANTEE_COST_MAX)


def cover_floor(num_experts: int, quotas: Ints, survive: int) -> int:
    """How many replicas every expert should have on distinct ranks, if balance permits."""
    cap = int((quotas > 0).sum())
    return min(cap, max(2, survive + 1, int(quotas.sum()) // num_experts))


def _covering(
    loads: Floats, hot_share: float, floor: int, cover_level: int, total: int, cap: int
) -> Ints:
    """Counts with which no replica carries more than `hot_share` of a rank's mean load: count =
    ceil(load / (hot_share * mean)). Then all experts are raised to 2, 3, … `cover_level` replicas,
    hottest first, while slots last; the rest is given by load. If the first counts do not fit, they
    are all `floor`."""
    mean = loads.sum(axis=1, keepdims=True) / cap
    counts = np.clip(np.ceil(loads / (hot_share * mean)), floor, cap).astype(np.int64)
    counts[counts.sum(axis=1) > total] = floor
    hottest = np.argsort(-loads, axis=1, kind="stable")
    for level in range(2, cover_level + 1):
        lacking = np.take_along_axis(np.maximum(level - counts, 0), hottest, axis=1)
        spare = total - counts.sum(axis=1, keepdims=True)
        granted = np.where(np.cumsum(lacking, axis=1) <= spare, lacking, 0)
        np.put_along_axis(
            counts, hottest, np.take_along_axis(counts, hottest, axis=1) + granted, axis=1
        )
    return spread_out(loads, counts, total, cap)


def spread_out(loads: Floats, least: Ints, total: int, cap: int) -> Ints:
    """The counts between `least` and `cap`, with `total` in each row, that minimise the largest
    load per replica. They are those of EPLB's greedy rule, but found by bisection on that load, and
    then greedily for the remainder, so that all layers are computed at once."""
    high = loads.max(axis=1, keepdims=True)
    low: Floats = loads.sum(axis=1, keepdims=True) / total / 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fitting = np.clip(np.ceil(loads / np.maximum(middle, 1e-300)), least, cap)
        fits = fitting.sum(axis=1, keepdims=True) <= total
        high, low = np.where(fits, middle, high), np.where(fits, low, middle)
    result: Ints = np.clip(np.ceil(loads / np.maximum(high, 1e-300)), least, cap).astype(np.int64)
    while (missing := total - result.sum(axis=1, keepdims=True)).any():
        order = np.argsort(np.where(result < cap, -loads / result, np.inf), axis=1, kind="stable")
        below_cap = np.take_along_axis(result, order, axis=1) < cap
        more = below_cap & (np.arange(loads.shape[1]) < missing)
        np.put_along_axis(result, order, np.take_along_axis(result, order, axis=1) + more, axis=1)
    return result


def estimate_imbalance(loads: Floats, counts: Ints, topology: RankTopology, quotas: Ints) -> Floats:
    """`[num_layers]` float64: an estimate of the busiest rank's load over the mean after packing,
    without packing."""
    total, slots = int(quotas.sum()), int(quotas.max())
    shares = np.sort(np.repeat((loads / counts).ravel(), counts.ravel()).reshape(-1, total))
    mean = loads.sum(axis=1, keepdims=True) / len(topology.ranks)
    return (
        _imbalance_few_slots(shares / mean, quotas)
        if slots <= FEW_SLOTS
        else _imbalance_many_slots(shares / mean, slots)
    )


def _imbalance_few_slots(shares: Floats, quotas: Ints) -> Floats:
    """For few slots per rank: deals in rounds, the hottest replica left to the idlest rank.
    Exchanges hardly improve on that, because few slots leave them little choice."""
    load = np.zeros((len(shares), len(quotas)))
    end = shares.shape[1]
    for slot in range(int(quotas.max())):
        open_ranks = np.flatnonzero(quotas > slot)
        load[:, open_ranks] = np.sort(load[:, open_ranks], axis=1)
        load[:, open_ranks] += shares[:, end - open_ranks.size : end][:, ::-1]
        end -= open_ranks.size
    result: Floats = load.max(axis=1)
    return result


def _imbalance_many_slots(shares: Floats, slots: int) -> Floats:
    """For many slots per rank, a lower bound that exchanges nearly reach: for each k, the k hottest
    replicas are on k ranks at best, whose other slots hold the coldest ones at best, so the busiest
    of them carries the mean of that."""
    total = shares.shape[1]
    rising = np.concatenate((np.zeros((len(shares), 1)), np.cumsum(shares, axis=1)), axis=1)
    k = np.arange(1, max(2, total // slots // 2 + 1))
    hot = rising[:, -1:] - rising[:, total - k]
    cold = rising[:, np.minimum(k * (slots - 1), total - k)]
    result: Floats = ((hot + cold) / k).max(axis=1)
    return result
