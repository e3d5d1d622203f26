"""A fresh placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from control_plane.placement.greedy_layer import place_layer
from control_plane.placement.layout import (
    Layout,
    checked_loads,
    empty_placement,
    fill_quotas,
)
from control_plane.placement.results import LayerExpert, Loads, PlacementPlan
from shared.types import ExpertId, NodeId, RankId


def place(
    loads: Loads,
    ranks: Sequence[RankId],
    nodes: Mapping[RankId, NodeId],
    slots: Mapping[RankId, int],
    *,
    redundant: int | None = None,
    num_ranks: int | None = None,
    survive: int = 0,
) -> PlacementPlan:
    weights = checked_loads(loads, *loads.shape)
    num_layers, num_experts = weights.shape
    layout = Layout.of(ranks, nodes, slots)
    rows = num_ranks or int(layout.ranks[-1]) + 1
    placement = empty_placement(layout, num_layers, rows, int(layout.slots.max()))
    quotas = fill_quotas(layout, num_experts, redundant)
    outside: list[tuple[float, LayerExpert]] = []
    for layer in range(num_layers):
        hottest = np.argsort(-weights[layer], kind="stable")
        counts = np.zeros(num_experts, dtype=np.int64)
        counts[hottest[: int(quotas.sum())]] = 1
        for _ in range(int(quotas.sum()) - num_experts):
            share = np.where(counts < len(quotas), weights[layer] / np.maximum(counts, 1), -1.0)
            counts[np.argmax(share)] += 1
        chosen = place_layer(weights[layer], counts, layout, quotas)
        for rank, experts in zip(layout.ranks, chosen, strict=True):
            placement[layer, rank, : len(experts)] = experts
        outside += [
            (float(weights[layer, e]), LayerExpert(layer, ExpertId(int(e))))
            for e in np.flatnonzero(counts == 0)
        ]
    return PlacementPlan(placement, tuple(pair for _, pair in sorted(outside)))
