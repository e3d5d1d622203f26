"""A cluster state at rest, for tests of what is asked of it."""

from __future__ import annotations

import numpy as np

from control_plane.cluster_state import ClusterState
from shared.desired_state import DesiredState
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import AgentRecord, InstanceSpec, RankRecord
from shared.types import Epoch, Incarnation, Member, NodeId, RankId, RankState
from tests.unit.control_plane.harness import spec as spec_of

NOTHING_ASKED = DesiredState()


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def record(
    rank: int, node: str, *, incarnation: int = 1, exchange: str = "transfer", started_at: float = 0
) -> RankRecord:
    return RankRecord(
        rank=RankId(rank),
        incarnation=Incarnation(incarnation),
        node=NodeId(node),
        pid=1000 + rank,
        lease_id=1,
        state=RankState.READY,
        control_host="h",
        control_port=1,
        transfer_name="t",
        slots=3,
        kv_blocks=1,
        kv_block_tokens=1,
        exchange=exchange,
        started_at=started_at,
    )


def agent(node: str, *ranks: int, ranks_max: int = 0, leaving: bool = False) -> AgentRecord:
    return AgentRecord(
        node=NodeId(node),
        pid=1,
        ranks=tuple(RankId(rank) for rank in ranks),
        ranks_max=ranks_max,
        leaving=leaving,
    )


def state_of(
    *agents: AgentRecord,
    desired: DesiredState = NOTHING_ASKED,
    spec: InstanceSpec | None = None,
    exchange: str = "transfer",
) -> ClusterState:
    """All ranks of the agents' flags serve, in incarnation 1."""
    spec = spec or spec_of(ranks=sum(len(a.ranks) for a in agents))
    records = {member(r): record(r, a.node, exchange=exchange) for a in agents for r in a.ranks}
    width = max(m.rank for m in records) + 1
    rows = np.arange(width * spec.slots_per_rank).reshape(width, -1) % spec.num_experts
    placement = np.broadcast_to(rows, (spec.num_moe_layers, *rows.shape)).astype(np.int16)
    expert_map = ExpertMap(
        epoch=Epoch(1),
        num_experts=spec.num_experts,
        members=tuple(sorted(records)),
        placement=placement,
    )
    return ClusterState(
        keys=Keys("t"),
        synced=True,
        spec=spec,
        expert_map=expert_map,
        records=records,
        agents={a.node: a for a in agents},
        desired=desired,
    )
