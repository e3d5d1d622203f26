"""Which failures a map survives, and what redundancy would survive more. The answers are exact."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from control_plane.placement.results import Advice, FaultTolerance, LayerExpert
from control_plane.placement.topology import Ints, RankTopology, presence
from shared.expert_map import ExpertMap
from shared.types import ExpertId, NodeId, RankId


def compute_fault_tolerance(
    expert_map: ExpertMap, nodes: Mapping[RankId, NodeId]
) -> FaultTolerance:
    """`rank_failures` is the largest number such that any so many deaths leave every expert a
    replica: min over layers and experts of the number of distinct ranks that hold it, minus 1. The
    same with nodes. `nodes` must name every member's node; raises ValueError if it does not."""
    topology = RankTopology.of_map(expert_map, nodes)
    on_rank = presence(expert_map.placement[:, topology.ranks], expert_map.num_experts) > 0
    on_node = _by_node(on_rank, topology)
    ranks, rank_nodes = on_rank.sum(axis=2), on_node.sum(axis=2)
    node_slots = np.bincount(topology.node, weights=topology.slots, minlength=topology.num_nodes)
    return FaultTolerance(
        rank_failures=max(0, int(ranks.min(initial=len(topology.ranks))) - 1),
        node_failures=max(0, int(rank_nodes.min(initial=topology.num_nodes)) - 1),
        rank_failures_with_reload=_with_reload(topology.slots, expert_map.num_experts),
        node_failures_with_reload=_with_reload(node_slots.astype(np.int64), expert_map.num_experts),
        at_risk_of_rank=_pairs(ranks == 1),
        at_risk_of_node=_pairs(rank_nodes == 1),
        lost_by_rank={
            RankId(int(rank)): int(lost)
            for rank, lost in zip(topology.ranks, _num_solely_held(on_rank), strict=True)
        },
        lost_by_node={
            name: int(lost)
            for name, lost in zip(topology.node_names, _num_solely_held(on_node), strict=True)
        },
    )


def advise(expert_map: ExpertMap, nodes: Mapping[RankId, NodeId]) -> tuple[Advice, ...]:
    """For each of the next three numbers of rank failures that the map does not survive: the
    redundancy that would survive them, if no expert loses a replica that it has now. For f
    failures, a layer needs the sum over its experts of max(replicas now, f + 1) slots."""
    topology = RankTopology.of_map(expert_map, nodes)
    on_rank = presence(expert_map.placement[:, topology.ranks], expert_map.num_experts) > 0
    counts = on_rank.sum(axis=2)
    survived = max(0, int(counts.min()) - 1)
    result = []
    for failures in range(survived + 1, min(survived + 4, len(topology.ranks))):
        filled = int(np.maximum(counts, failures + 1).sum(axis=1).max())
        result.append(
            Advice(
                rank_failures=failures,
                node_failures=min(failures, topology.num_nodes - 1),
                redundant=filled - expert_map.num_experts,
                slots_per_rank=-(-filled // len(topology.ranks)),
            )
        )
    return tuple(result)


def describe(tolerance: FaultTolerance, advice: tuple[Advice, ...]) -> str:
    """For the log: one sentence on what the map survives, and one on what would survive more."""
    text = (
        f"The map survives {_any(tolerance.rank_failures, 'rank')} and "
        f"{_any(tolerance.node_failures, 'node')} without a reload, "
        f"{_any(tolerance.rank_failures_with_reload, 'rank')} and "
        f"{_any(tolerance.node_failures_with_reload, 'node')} with one."
    )
    if advice:
        more = advice[0]
        text += (
            f" {more.redundant} redundant experts ({more.slots_per_rank} filled slots a rank) "
            f"would survive {_any(more.rank_failures, 'rank')} without a reload."
        )
    return text


def _any(count: int, what: str) -> str:
    return f"{'any ' if count else ''}{count or 'no'} {what} failure{'s' if count > 1 else ''}"


def _by_node(on_rank: NDArray[np.bool_], topology: RankTopology) -> NDArray[np.bool_]:
    """`[num_layers, num_experts, num_nodes]` bool: whether a rank of the node holds the expert."""
    result = np.zeros((*on_rank.shape[:2], topology.num_nodes), dtype=bool)
    for node in range(topology.num_nodes):
        result[:, :, node] = on_rank[:, :, topology.node == node].any(axis=2)
    return result


def _num_solely_held(holds: NDArray[np.bool_]) -> Ints:
    """`[num_holders]`: of how many experts, over all layers, each holder has the only replica."""
    alone = holds & (holds.sum(axis=2) == 1)[:, :, None]
    result: Ints = alone.sum(axis=(0, 1)).astype(np.int64)
    return result


def _with_reload(slots: Ints, num_experts: int) -> int:
    """The most failures after which the remaining slots suffice for one replica of each expert. The
    worst case loses the largest first. Slots of surplus replicas count, since they may be
    overwritten."""
    left = int(slots.sum()) - np.cumsum(np.sort(slots)[::-1])
    return int((left >= num_experts).sum())


def _pairs(mask: NDArray[np.bool_]) -> tuple[LayerExpert, ...]:
    return tuple(LayerExpert(int(a), ExpertId(int(b))) for a, b in np.argwhere(mask))
