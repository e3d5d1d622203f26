"""What the present map survives, as metrics. Computed when they are asked for, beside the event
loop: right after a death that has more urgent work."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge

from control_plane.placement import FaultTolerance, compute_fault_tolerance
from shared.expert_map import ExpertMap
from shared.records import RankRecord
from shared.types import Epoch, Member, NodeId

_UNKNOWN = NodeId("unknown")


class ToleranceGauges:
    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge("starfish_" + name, text, registry=registry)

        self.rank_failures = gauge(
            "survivable_rank_failures", "rank failures that the map survives without a reload"
        )
        self.node_failures = gauge(
            "survivable_node_failures", "host failures that the map survives without a reload"
        )
        self.rank_failures_with_reload = gauge(
            "survivable_rank_failures_with_reload",
            "rank failures that it survives if survivors load what is lost",
        )
        self.single_experts = gauge(
            "experts_on_one_rank", "experts, summed over layers, that only one rank of the map has"
        )
        self._map: ExpertMap | None = None
        self._records: Mapping[Member, RankRecord] = {}
        self._epoch = Epoch(0)  # of the map for which the gauges are set

    def on_state(self, expert_map: ExpertMap | None, records: Mapping[Member, RankRecord]) -> None:
        self._map, self._records = expert_map, records

    async def update(self) -> None:
        """Sets the gauges for the present map."""
        expert_map, records = self._map, self._records
        if expert_map is None or expert_map.epoch == self._epoch:
            return
        found = await asyncio.to_thread(_tolerance, expert_map, records)
        self._epoch = expert_map.epoch
        self.rank_failures.set(found.rank_failures)
        self.node_failures.set(found.node_failures)
        self.rank_failures_with_reload.set(found.rank_failures_with_reload)
        self.single_experts.set(len(found.at_risk_of_rank))


def _tolerance(expert_map: ExpertMap, records: Mapping[Member, RankRecord]) -> FaultTolerance:
    """A member whose lease has just ended still counts."""
    members = expert_map.members
    nodes = {m.rank: records[m].node if m in records else _UNKNOWN for m in members}
    return compute_fault_tolerance(expert_map, nodes)
