"""What an agent says of its node: which of its ranks serve, and whether all do. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from shared.types import Member, RankId


class RankHealth(Enum):
    SERVING = "serving"  # its present incarnation is in the map
    JOINING = "joining"  # its process runs, and no map has it
    DOWN = "down"  # it has no process, or one that is exiting


def node_report(
    ranks: Sequence[RankId], alive: Iterable[Member], members: Iterable[Member] | None
) -> dict[str, Any]:
    """The body of `/health`. `alive`: the ranks whose processes run. `members`: those of the map;
    None if no map was ever published."""
    running = {member.rank: member for member in alive}
    serving = frozenset(members or ())
    states = {
        rank: _state(running.get(rank), serving) for rank in sorted(set(ranks) | set(running))
    }
    reasons = [
        f"rank {rank} is {state.value}"
        for rank, state in states.items()
        if state is not RankHealth.SERVING
    ]
    if members is None:
        reasons = ["no expert map is published yet"]
    return {
        "status": "not_ready" if reasons else "ready",
        "live": True,
        "ranks": {str(rank): state.value for rank, state in states.items()},
        "reasons": reasons,
    }


def _state(running: Member | None, serving: frozenset[Member]) -> RankHealth:
    if running is None:
        return RankHealth.DOWN
    return RankHealth.SERVING if running in serving else RankHealth.JOINING
