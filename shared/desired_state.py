"""What people want of a running instance: which ranks there are and where, which of them are to be
emptied or restarted, whether verdicts are paused. It is one record in etcd, so that whoever carries
it out may die in the middle and another goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated

from msgspec import Meta

from shared.types import Incarnation, NodeId, RankId

RANKS_MAX = 4096
GRACE_S_MAX = 24 * 3600.0
NODE_CHARACTERS_MAX = 253


class AfterDrain(Enum):
    """What becomes of a rank once it serves nobody."""

    STAY = "stay"  # its process waits outside the map until the rank is undrained
    RESTART = "restart"  # its agent starts a new process, which joins
    LEAVE = "leave"  # its agent ends the process; the rank is desired no more


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredRank:
    """A rank that shall exist. `node` is empty if any agent that has the rank in its flags, or has
    room, may run it."""

    rank: Annotated[RankId, Meta(ge=0, lt=RANKS_MAX)]
    node: NodeId = NodeId("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """A rank gets no new sessions. Those that it has finish within `grace_s` seconds from
    `requested_at` (Unix seconds), or move with their KV; then the rank leaves the map.

    `incarnation` is the one that was registered when the drain was asked for, 0 if none was: with
    RESTART and LEAVE a later one is not meant."""

    rank: Annotated[RankId, Meta(ge=0, lt=RANKS_MAX)]
    incarnation: Incarnation = Incarnation(0)
    requested_at: float = 0.0
    grace_s: Annotated[float, Meta(ge=0.0, le=GRACE_S_MAX)] = 30.0
    after: AfterDrain = AfterDrain.STAY


@dataclass(frozen=True, slots=True, kw_only=True)
class RollingRestart:
    """Ranks that are still to be restarted, one after the other, in this order. Their processes
    that registered before `requested_at` (Unix seconds) are the ones to be replaced."""

    ranks: tuple[RankId, ...] = ()
    requested_at: float = 0.0
    grace_s: Annotated[float, Meta(ge=0.0, le=GRACE_S_MAX)] = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRequest:
    """A request for a change that was answered. `digest` is of what it asked for, `change` the
    number of the newest change after it, `num_ranks` how many ranks were to exist then."""

    request_id: str
    digest: str
    change: int
    num_ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """The leading control plane writes it, in a transaction that compares the leader and this key's
    revision, when somebody asks for a change and when a part of one is done.

    `ranks` empty: the ranks of the spec, wherever agents run them. `change` grows with every
    change that somebody asked for. `rebalances` counts the rebalancings asked for. `requests` are
    the newest request ids, oldest first: the same one again changes nothing. `known` has what is
    known of them; of one that an older release took, nothing is."""

    change: int = 0
    ranks: tuple[DesiredRank, ...] = ()
    drains: tuple[Drain, ...] = ()
    restart: RollingRestart | None = None
    verdicts_paused: bool = False
    rebalances: int = 0
    requests: tuple[str, ...] = ()
    known: tuple[KnownRequest, ...] = ()

    def known_request(self, request_id: str) -> KnownRequest | None:
        return next((each for each in self.known if each.request_id == request_id), None)

    def drain_of(self, rank: RankId) -> Drain | None:
        return next((drain for drain in self.drains if drain.rank == rank), None)

    def rank_ids(self, num_ranks: int) -> tuple[RankId, ...]:
        """The ranks that shall exist, ascending, if the spec has `num_ranks`."""
        if not self.ranks:
            return tuple(RankId(rank) for rank in range(num_ranks))
        return tuple(sorted(each.rank for each in self.ranks))

    def node_of(self, rank: RankId) -> NodeId:
        """Empty: no node is asked for."""
        return next((each.node for each in self.ranks if each.rank == rank), NodeId(""))

    def without_drain(self, rank: RankId) -> DesiredState:
        return replace(self, drains=tuple(drain for drain in self.drains if drain.rank != rank))

    def with_drain(self, new: Drain) -> DesiredState:
        """It replaces another one of the rank."""
        drains = (*self.without_drain(new.rank).drains, new)
        return replace(self, drains=tuple(sorted(drains, key=lambda drain: drain.rank)))

    def is_to_leave(
        self, rank: RankId, process: Incarnation, node: NodeId | None, *, num_ranks: int
    ) -> bool:
        """Whether a drain keeps this process of the rank out of the map, or ends its membership.
        `process` is the first incarnation of the process, `node` where it runs, None if nobody
        knows. `num_ranks` as for `rank_ids`."""
        drain = self.drain_of(rank)
        if drain is None:
            return False
        match drain.after:
            case AfterDrain.STAY:
                return True
            case AfterDrain.RESTART:
                return process <= drain.incarnation
            case AfterDrain.LEAVE:
                is_desired = rank in self.rank_ids(num_ranks)
                return not is_desired or self.node_of(rank) not in (NodeId(""), node)
