"""Whether an instance can do without some of its ranks, and how many it may have at most. Pure."""

from __future__ import annotations

from collections.abc import Collection

from control_plane.cluster_state import ClusterState
from shared.desired_state import RANKS_MAX
from shared.types import RankId

_ON_CARDS = frozenset({"ep", "ep-fp8"})


class Capacity:
    """Counts the slots of ranks that serve now, or may do so at any moment. A state without a
    spec has none."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state

    def refuse_without(self, leaving: Collection[RankId]) -> tuple[str, str] | None:
        """Why these ranks cannot leave the map together, and what would be needed; None if the
        others can hold every expert."""
        spec = self._state.spec
        if spec is None:
            return "the instance has not been described yet", ""
        remaining = self._remaining(leaving)
        if not remaining:
            least = -(-spec.num_experts // spec.slots_per_rank)
            return (
                "no other rank serves",
                f"add ranks first, undrain some, or let {least} of these stay "
                f"({spec.num_experts} experts need so many ranks of {spec.slots_per_rank} slots)",
            )
        slots = sum(remaining.values())
        if slots >= spec.num_experts:
            return None
        missing = spec.num_experts - slots
        more = -(-missing // spec.slots_per_rank)
        return (
            f"the ranks that stay have {slots} slots in each layer for {spec.num_experts} experts",
            f"{more} more rank{'s' if more > 1 else ''} of {spec.slots_per_rank} slots must serve: "
            "add some first, or undrain those that are drained",
        )

    def _remaining(self, leaving: Collection[RankId]) -> dict[RankId, int]:
        """The slots of each rank that stays: members of the map that nobody drains."""
        state = self._state
        drained = {drain.rank for drain in state.desired.drains}
        expert_map, spec = state.expert_map, state.spec
        if expert_map is None or spec is None:
            return {}
        return {
            member.rank: state.records[member].slots
            if member in state.records
            else spec.slots_per_rank
            for member in expert_map.members
            if member.rank not in drained
            and member.rank not in leaving
            and member not in state.verdicts
        }


def rank_limit(state: ClusterState) -> int:
    """Ranks are numbered below this. On cards the exchange buffers are made for a number of ranks
    when the instance starts."""
    spec = state.spec
    if spec is None:
        return 0
    if spec.ranks_max > 0 or any(r.exchange in _ON_CARDS for r in state.records.values()):
        return spec.capacity
    return RANKS_MAX
