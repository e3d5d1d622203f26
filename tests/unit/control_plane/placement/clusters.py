"""Clusters of every awkward shape, for the placement properties; and the checks they share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from control_plane.placement import PlacementPlan, place
from shared.expert_map import ExpertMap, Placement
from shared.types import Epoch, Incarnation, Member, NodeId, RankId

bounded = settings(max_examples=50, deadline=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    loads: NDArray[np.float64]
    nodes: dict[RankId, NodeId]
    slots: dict[RankId, int]
    redundant: int | None

    @property
    def ranks(self) -> list[RankId]:
        return sorted(self.nodes)

    @property
    def num_experts(self) -> int:
        return int(self.loads.shape[1])

    @property
    def total_slots(self) -> int:
        return sum(self.slots.values())

    def place(self, survive: int = 0) -> PlacementPlan:
        return place(
            self.loads,
            self.ranks,
            self.nodes,
            self.slots,
            redundant=self.redundant,
            survive=survive,
        )

    def map_of(self, placement: Placement, ranks: Iterable[RankId] | None = None) -> ExpertMap:
        members = self.ranks if ranks is None else sorted(ranks)
        return ExpertMap(
            epoch=Epoch(1),
            num_experts=self.num_experts,
            members=tuple(Member(rank=r, incarnation=Incarnation(1)) for r in members),
            placement=placement.copy(),
        )


@st.composite
def clusters(draw: st.DrawFn, *, fits_all_experts: bool = False, even: bool = False) -> Cluster:
    """`fits_all_experts`: slots for every expert, none left out; `even`: equal ranks and equal
    nodes."""
    num_nodes = draw(st.integers(1, 4))
    if even:
        per_node = draw(st.integers(1, 3))
        node_of = [i // per_node for i in range(num_nodes * per_node)]
    else:
        node_of = draw(st.lists(st.integers(0, num_nodes - 1), min_size=1, max_size=7))
    num_ranks = len(node_of)
    num_experts = draw(st.integers(1, 12))
    each = draw(st.integers(1, 6))
    slots = [each if even else draw(st.integers(0, 6)) for _ in node_of]
    if fits_all_experts and sum(min(s, num_experts) for s in slots) < num_experts:
        slots = [max(s, -(-num_experts // num_ranks)) for s in slots]
    seed = draw(st.integers(0, 2**32 - 1))
    shape = (draw(st.integers(1, 3)), num_experts)
    loads = np.random.default_rng(seed).lognormal(0, draw(st.sampled_from([0.0, 0.5, 2.0])), shape)
    loads[:, draw(st.integers(0, num_experts)) :] *= draw(st.sampled_from([0.0, 1.0]))
    return Cluster(
        loads=loads,
        nodes={RankId(r): NodeId(f"node{n}") for r, n in enumerate(node_of)},
        slots={RankId(r): s for r, s in enumerate(slots)},
        redundant=draw(st.one_of(st.none(), st.integers(0, 2 * num_experts))),
    )


def holders(placement: Placement, layer: int, expert: int) -> list[int]:
    """The rank of each slot that holds the expert."""
    return [int(r) for r in np.nonzero(placement[layer] == expert)[0]]


def bench_cluster(
    *,
    layers: int = 6,
    experts: int = 64,
    ranks: int = 8,
    nodes: int = 4,
    slots: int = 16,
    seed: int = 0,
) -> Cluster:
    """A regular cluster of a realistic kind, for what only shows at some size."""
    return Cluster(
        loads=np.random.default_rng(seed).lognormal(0, 0.7, (layers, experts)),
        nodes={RankId(r): NodeId(f"node{r * nodes // ranks}") for r in range(ranks)},
        slots={RankId(r): slots for r in range(ranks)},
        redundant=None,
    )
