"""The bodies that the admin API reads, and the changes that they ask for. A field that is not known
is refused: a misspelt one would have no effect."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from control_plane.cluster_state import ClusterState
from control_plane.desired_changes import (
    DEFAULT_GRACE_S,
    Change,
    DrainNode,
    DrainRanks,
    PauseVerdicts,
    Rebalance,
    Replace,
    RestartRanks,
    ResumeVerdicts,
    Scale,
    StopRestart,
    Undrain,
    UndrainNode,
)
from shared.desired_state import GRACE_S_MAX, NODE_CHARACTERS_MAX, RANKS_MAX, AfterDrain
from shared.errors import RequestError
from shared.types import NodeId, RankId

Rank = Annotated[int, Meta(ge=0, lt=RANKS_MAX)]
Ranks = Annotated[tuple[Rank, ...], Meta(max_length=RANKS_MAX)]
Node = Annotated[str, Meta(max_length=NODE_CHARACTERS_MAX)]
GraceS = Annotated[
    float,
    Meta(ge=0.0, le=GRACE_S_MAX, description="for how long sessions may finish where they are"),
]
RequestId = Annotated[
    str,
    Meta(
        max_length=128,
        pattern=r"^[!-~]*$",
        description="the same one again changes nothing: so a request may be repeated",
    ),
]


class ChangeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What all of them have."""

    request_id: RequestId = ""

    def change(self, state: ClusterState) -> Change:
        """Raises RequestError if the fields contradict each other."""
        raise NotImplementedError


class ScaleBody(ChangeBody, kw_only=True):
    """`ranks`: how many there shall be. Or `add` of them more, or those in `add_ranks`, or without
    those in `remove`. `node`: where the new ones run."""

    ranks: Annotated[int, Meta(ge=1, le=RANKS_MAX)] | None = None
    add: Annotated[int, Meta(ge=1, le=RANKS_MAX)] | None = None
    add_ranks: Ranks = ()
    remove: Ranks = ()
    node: Node = ""
    grace_s: GraceS = DEFAULT_GRACE_S

    def change(self, state: ClusterState) -> Change:
        given = (self.ranks is not None, self.add is not None, self.add_ranks, self.remove)
        if sum(map(bool, given)) != 1:
            raise RequestError("pass one of ranks, add, add_ranks and remove", param="ranks")
        if self.remove:
            if self.node:
                raise RequestError("node is for ranks that come, not for remove", param="node")
            return DrainRanks(
                ranks=_ranks(self.remove), grace_s=self.grace_s, after=AfterDrain.LEAVE
            )
        coming, num_ranks = _ranks(self.add_ranks), self.ranks
        if num_ranks is None:
            now = state.desired.rank_ids(state.spec.num_ranks if state.spec else 0)
            num_ranks = len(now) + (self.add or len(coming))
        return Scale(
            num_ranks=num_ranks, grace_s=self.grace_s, coming=coming, node=NodeId(self.node)
        )


class DrainBody(ChangeBody, kw_only=True):
    """`rank`, or several `ranks` together, or all ranks of `node`."""

    rank: Rank | None = None
    ranks: Ranks = ()
    node: Node = ""
    grace_s: GraceS = DEFAULT_GRACE_S

    def change(self, state: ClusterState) -> Change:
        if node := _node_or_none(self.rank, self.ranks, self.node):
            return DrainNode(node=node, grace_s=self.grace_s)
        return DrainRanks(ranks=_named(self.rank, self.ranks), grace_s=self.grace_s)


class UndrainBody(ChangeBody, kw_only=True):
    """`rank`, or several `ranks` together, or all ranks of `node`."""

    rank: Rank | None = None
    ranks: Ranks = ()
    node: Node = ""

    def change(self, state: ClusterState) -> Change:
        if node := _node_or_none(self.rank, self.ranks, self.node):
            return UndrainNode(node=node)
        return Undrain(ranks=_named(self.rank, self.ranks))


class KillBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`incarnation` says which life is meant: asked for again, this does not hit the next one."""

    rank: Rank
    incarnation: Annotated[int, Meta(ge=1)]


class ReplaceBody(ChangeBody, kw_only=True):
    """`rank` moves to `node`; with the node that it has, to a new process."""

    rank: Rank
    node: Annotated[str, Meta(min_length=1, max_length=NODE_CHARACTERS_MAX)]
    grace_s: GraceS = DEFAULT_GRACE_S

    def change(self, state: ClusterState) -> Change:
        return Replace(rank=RankId(self.rank), node=NodeId(self.node), grace_s=self.grace_s)


class RestartBody(ChangeBody, kw_only=True):
    """A new process for each of `ranks` (if they are left out: for all), one after the other.
    `stop`: the restart that is under way goes no further."""

    rolling: bool = True
    ranks: Ranks | None = None
    stop: bool = False
    grace_s: GraceS = DEFAULT_GRACE_S

    def change(self, state: ClusterState) -> Change:
        if self.stop:
            if self.ranks is not None:
                raise RequestError("stop ends the whole restart: leave ranks out", param="ranks")
            return StopRestart()
        if not self.rolling:
            message = "only a rolling restart serves meanwhile: leave rolling out, or pass true"
            raise RequestError(message, param="rolling")
        if self.ranks == ():
            message = "ranks names none: leave it out to restart all"
            raise RequestError(message, param="ranks")
        return RestartRanks(ranks=_ranks(self.ranks or ()), grace_s=self.grace_s)


class PauseBody(ChangeBody, kw_only=True):
    def change(self, state: ClusterState) -> Change:
        return PauseVerdicts()


class ResumeBody(ChangeBody, kw_only=True):
    def change(self, state: ClusterState) -> Change:
        return ResumeVerdicts()


class RebalanceBody(ChangeBody, kw_only=True):
    def change(self, state: ClusterState) -> Change:
        return Rebalance()


def _ranks(numbers: tuple[int, ...]) -> tuple[RankId, ...]:
    return tuple(RankId(rank) for rank in sorted(set(numbers)))


def _named(rank: int | None, ranks: tuple[int, ...]) -> tuple[RankId, ...]:
    return _ranks(ranks if rank is None else (rank,))


def _node_or_none(rank: int | None, ranks: tuple[int, ...], node: str) -> NodeId | None:
    """Raises RequestError unless exactly one of the three is given."""
    if (rank is not None) + bool(ranks) + bool(node) != 1:
        raise RequestError("pass one of rank, ranks and node", param="rank")
    return NodeId(node) if node else None
