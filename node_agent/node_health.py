"""What an agent says of its node: which of its ranks serve, and whether all do. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from enum import Enum
from typing import Any

from shared.types import Member, RankId


class RankHealth(Enum):
    SERVING = "serving"  # its present incarnation is in the map
    JOINING = "joining"  # its process runs, and no map has it
    DRAINED = "drained"  # no map has it, as somebody asked for
    DOWN = "down"  # it has no process, or one that is exiting


def node_report(
    ranks: Sequence[RankId],
    alive: Iterable[Member],
    members: Iterable[Member] | None,
    drains: Collection[RankId] = (),
) -> dict[str, Any]:
    """The body of `/health`. `alive`: the ranks whose processes run. `members`: those of the map;
    None if no map was ever published. `drains`: the ranks that shall be outside of it."""
    running = {member.rank: member for member in alive}
    serving = frozenset(members or ())
    states = {
        rank: _state(running.get(rank), serving, rank in drains)
        for rank in sorted(set(ranks) | set(running))
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


def _state(running: Member | None, serving: frozenset[Member], is_drained: bool) -> RankHealth:
    if running is None:
        return RankHealth.DOWN
    if running in serving:
        return RankHealth.SERVING
    return RankHealth.DRAINED if is_drained else RankHealth.JOINING
