"""On which node a new rank is to run, by what the node agents say of theirs. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from control_plane.cluster_state import ClusterState
from shared.records import AgentRecord
from shared.types import NodeId, RankId

ANY_NODE = NodeId("")


class NodeChoice:
    """`take` each new rank once: the next one finds the node fuller."""

    def __init__(self, state: ClusterState) -> None:
        self._agents: Mapping[NodeId, AgentRecord] = {
            node: agent for node, agent in state.agents.items() if not agent.leaving
        }
        self._num_ranks = Counter(_nodes_of_ranks(state))

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(sorted(self._agents))

    @property
    def what_is_needed(self) -> str:
        if not self._agents:
            return "start a node agent"
        return "start a node agent on another host, or with a higher --ranks-max"

    def take(self, rank: RankId, node: NodeId = ANY_NODE) -> NodeId | None:
        """The node, if it has room; else one that has the rank in its flags; else the one with the
        fewest ranks. None: there is no room."""
        candidates = [node] if node else list(self._agents)
        with_room = [each for each in candidates if self._has_room(each)]
        if not with_room:
            return None
        chosen = min(
            with_room,
            key=lambda each: (rank not in self._agents[each].ranks, self._num_ranks[each], each),
        )
        self._num_ranks[chosen] += 1
        return chosen

    def _has_room(self, node: NodeId) -> bool:
        agent = self._agents.get(node)
        if agent is None:
            return False
        return agent.ranks_max == 0 or self._num_ranks[node] < agent.ranks_max


def _nodes_of_ranks(state: ClusterState) -> list[NodeId]:
    """One entry for each rank that runs or shall run there."""
    if state.spec is None:
        return []
    ranks = set(state.desired.rank_ids(state.spec.num_ranks)) | set(state.newest_records())
    return [node for rank in ranks if (node := node_of(state, RankId(rank)))]


def node_of(state: ClusterState, rank: RankId) -> NodeId:
    """Where a rank shall run, or runs, or is started by its agent's flags; empty if nobody
    knows."""
    if wanted := state.desired.node_of(rank):
        return wanted
    if runs_on := node_of_record(state, rank):
        return runs_on
    return next((a.node for a in state.agents.values() if rank in a.ranks), NodeId(""))


def node_of_record(state: ClusterState, rank: RankId) -> NodeId:
    """Where a rank runs; empty if it does not."""
    record = state.newest_records().get(rank)
    return NodeId("") if record is None else record.node
