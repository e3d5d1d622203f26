"""What somebody asks of a running instance: the input of the planner of changes. Nodes are resolved
to ranks before, so that each request says which ranks it means."""

from __future__ import annotations

from dataclasses import dataclass

from shared.types import NodeId, RankId


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleTo:
    """The instance shall have `num_ranks` ranks: the lowest free numbers come, the highest go."""

    num_ranks: int
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleBy:
    """The ranks `add` shall exist, on `node` unless it is empty; the ranks `remove` shall not."""

    add: tuple[RankId, ...]
    remove: tuple[RankId, ...]
    grace_s: float
    node: NodeId = NodeId("")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRanks:
    """They shall serve nobody and leave the map, but stay as processes."""

    ranks: tuple[RankId, ...]
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UndrainRanks:
    ranks: tuple[RankId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceRank:
    """It shall run on `node`, not where it runs now."""

    rank: RankId
    node: NodeId
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartRanks:
    """Each gets a new process, one after the other, in this order."""

    ranks: tuple[RankId, ...]
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseVerdicts:
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalance:
    """Experts shall move to where they are worth most now, without waiting for quiet."""


ChangeRequest = (
    ScaleTo
    | ScaleBy
    | DrainRanks
    | UndrainRanks
    | ReplaceRank
    | RestartRanks
    | PauseVerdicts
    | Rebalance
)
