"""The ranks and nodes that a placement is made for, as arrays, and the load that it gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from control_plane.placement.results import Loads
from shared.expert_map import ExpertMap, Placement
from shared.types import ABSENT_SLOT, EMPTY_SLOT, NodeId, RankId

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTopology:
    """The ranks that take part, in ascending order, with their nodes (as indices) and their slots
    per layer."""

    ranks: Ints  # [num_live]
    node: Ints  # [num_live]
    slots: Ints  # [num_live]
    node_names: tuple[NodeId, ...]

    @property
    def num_nodes(self) -> int:
        return len(self.node_names)

    @classmethod
    def of(
        cls, ranks: Sequence[RankId], nodes: Mapping[RankId, NodeId], slots: Mapping[RankId, int]
    ) -> RankTopology:
        """Raises ValueError if there is no rank, or if one is named twice, is negative, has no
        node, or has no valid slot count."""
        ordered = sorted(ranks)
        if not ordered:
            raise ValueError("placement needs at least one rank")
        if len(set(ordered)) != len(ordered) or ordered[0] < 0:
            raise ValueError("ranks must be distinct and not negative")
        missing = [r for r in ordered if r not in nodes or r not in slots]
        if missing:
            raise ValueError(f"rank {missing[0]} has no node or no slot count")
        if min(slots[r] for r in ordered) < 0:
            raise ValueError("a slot count is negative")
        names = tuple(sorted({nodes[r] for r in ordered}))
        index = {name: i for i, name in enumerate(names)}
        return cls(
            ranks=np.array(ordered, dtype=np.int64),
            node=np.array([index[nodes[r]] for r in ordered], dtype=np.int64),
            slots=np.array([slots[r] for r in ordered], dtype=np.int64),
            node_names=names,
        )

    @classmethod
    def of_map(cls, expert_map: ExpertMap, nodes: Mapping[RankId, NodeId]) -> RankTopology:
        """The members of a map, with the slots that its first layer has."""
        members = sorted(m.rank for m in expert_map.members)
        exists = (expert_map.placement[0] != ABSENT_SLOT).sum(axis=1)
        return cls.of(members, nodes, {r: int(exists[r]) for r in members})


def checked_loads(loads: Loads, num_layers: int, num_experts: int) -> Floats:
    """A float64 copy of `loads`. A layer without any load counts as evenly loaded. Raises
    ValueError if the shape is wrong or a value is negative or not finite."""
    result = np.array(loads, dtype=np.float64)
    if result.shape != (num_layers, num_experts):
        raise ValueError(
            f"loads have shape {result.shape}, the map needs {(num_layers, num_experts)}"
        )
    if not np.isfinite(result).all() or (result < 0).any():
        raise ValueError("loads must be finite and not negative")
    result[result.sum(axis=1) == 0] = 1.0
    return result


def loads_or_even(loads: Loads | None, num_layers: int, num_experts: int) -> Floats:
    if loads is None:
        return np.ones((num_layers, num_experts))
    return checked_loads(loads, num_layers, num_experts)


def presence(placement: Placement, num_experts: int) -> NDArray[np.int16]:
    """`[num_layers, num_experts, num_ranks]` int16: how many slots of the rank hold the expert."""
    num_layers, num_ranks, _ = placement.shape
    result = np.zeros((num_layers, num_experts, num_ranks), dtype=np.int16)
    layer, rank, slot = np.nonzero(placement >= 0)
    np.add.at(result, (layer, placement[layer, rank, slot], rank), 1)
    return result


def replica_counts(placement: Placement, num_experts: int) -> Ints:
    """`[num_layers, num_experts]` int64: how many slots hold the expert."""
    num_layers = placement.shape[0]
    flat = placement.reshape(num_layers, -1).astype(np.int64)
    keys = np.where(flat >= 0, flat, num_experts) + np.arange(num_layers)[:, None] * (
        num_experts + 1
    )
    counts = np.bincount(keys.ravel(), minlength=num_layers * (num_experts + 1))
    return counts.reshape(num_layers, num_experts + 1)[:, :num_experts].astype(np.int64)


def rank_loads(placement: Placement, loads: Loads) -> Floats:
    """`[num_layers, num_ranks]` float64: the load of each rank. Each replica of an expert carries
    load / count, as EPLB assumes."""
    num_experts = loads.shape[1]
    counts = np.maximum(replica_counts(placement, num_experts), 1)
    share = np.zeros((loads.shape[0], num_experts + 1))
    share[:, :num_experts] = loads / counts
    held = np.where(placement >= 0, placement, num_experts)
    layers = np.arange(placement.shape[0])[:, None, None]
    result: Floats = share[layers, held].sum(axis=2)
    return result


def balance(placement: Placement, loads: Loads, ranks: Sequence[RankId]) -> Floats:
    """`[num_layers]` float64: the largest load among `ranks` over their mean load; 1 is perfect,
    and a layer without load has 1."""
    per_rank = rank_loads(placement, loads)[:, np.array(ranks, dtype=np.int64)]
    mean = per_rank.mean(axis=1)
    return np.where(mean > 0, per_rank.max(axis=1) / np.where(mean > 0, mean, 1.0), 1.0)


def fill_target(topology: RankTopology, num_experts: int, redundant: int | None) -> int:
    """How many slots of each layer are filled when no rank is missing: `num_experts + redundant`,
    or all if None, but no rank needs more slots than there are experts."""
    capacity = int(np.minimum(topology.slots, num_experts).sum())
    return capacity if redundant is None else min(capacity, num_experts + redundant)


def fill_quotas(topology: RankTopology, num_experts: int, redundant: int | None) -> Ints:
    """`[num_live]` int64: how many slots of each rank are filled when no rank is missing.

    They are as equal as the ranks' slots permit (water-filling): each rank gets the same number, or
    all its slots if it has fewer. The remainder goes to one rank of each node in turn, so that no
    node is favoured.
    """
    capacity = np.minimum(topology.slots, num_experts)
    target = fill_target(topology, num_experts, redundant)
    level = 0
    while np.minimum(capacity, level + 1).sum() <= target and level < capacity.max(initial=0):
        level += 1
    quotas = np.minimum(capacity, level)
    order = np.argsort(_place_in_node(topology.node), kind="stable")
    open_ranks = order[capacity[order] > level]
    quotas[open_ranks[: target - int(quotas.sum())]] += 1
    return quotas


def _place_in_node(node: Ints) -> Ints:
    """`[num_live]`: 0 for the first rank of each node, 1 for the second, and so on."""
    order = np.argsort(node, kind="stable")
    starts = np.concatenate(([True], np.diff(node[order]) > 0))
    first = np.maximum.accumulate(np.where(starts, np.arange(len(node)), 0))
    result = np.empty_like(node)
    result[order] = np.arange(len(node)) - first
    return result


def empty_placement(
    topology: RankTopology, num_layers: int, num_ranks: int, slots_per_rank: int
) -> Placement:
    """`[num_layers, num_ranks, slots_per_rank]` int16: EMPTY_SLOT in every slot of `topology`,
    ABSENT_SLOT elsewhere."""
    result = np.full((num_layers, num_ranks, slots_per_rank), ABSENT_SLOT, dtype=np.int16)
    for rank, count in zip(topology.ranks, topology.slots, strict=True):
        result[:, rank, :count] = EMPTY_SLOT
    return result
