"""What `GET /v1/experts` answers: where each expert's replicas are, and how much work it is."""

from __future__ import annotations

import msgspec
import numpy as np

from control_plane.placement.topology import Floats
from shared.expert_map import ExpertMap


class ExpertsAnswer(msgspec.Struct, kw_only=True):
    """Lists by MoE layer, then by expert. `ranks` are those that hold a replica, one entry each.
    `load` is the work that an expert has been lately over the mean expert of its layer; null as
    long as ranks have counted too few tokens."""

    epoch: int
    num_experts: int
    ranks: list[list[list[int]]]
    load: list[list[float]] | None


def experts_of(expert_map: ExpertMap | None, loads: Floats | None) -> ExpertsAnswer:
    """`loads`: [num_layers, num_experts], as `LoadMeter` has them."""
    if expert_map is None:
        return ExpertsAnswer(epoch=0, num_experts=0, ranks=[], load=None)
    found: list[list[list[int]]] = [
        [[] for _ in range(expert_map.num_experts)] for _ in range(expert_map.num_layers)
    ]
    for layer, rank, place in np.argwhere(expert_map.computed >= 0).tolist():
        found[layer][int(expert_map.computed[layer, rank, place])].append(rank)
    return ExpertsAnswer(
        epoch=expert_map.epoch,
        num_experts=expert_map.num_experts,
        ranks=found,
        load=None if loads is None else _over_mean(loads),
    )


def _over_mean(loads: Floats) -> list[list[float]]:
    mean_L1 = np.maximum(loads.mean(axis=1, keepdims=True), 1e-9)
    shares: list[list[float]] = np.round(loads / mean_L1, 2).tolist()
    return shares
