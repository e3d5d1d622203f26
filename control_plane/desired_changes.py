"""What a change on purpose makes of the desired state, or why it cannot be. Pure: the cluster state
and one requested change in; a new desired state, or a refusal, out. It writes nothing, and who
carries the change out is `planned_change`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from control_plane.capacity import Capacity, rank_limit
from control_plane.cluster_state import ClusterState
from control_plane.known_requests import why_reused, with_request
from control_plane.node_choice import NodeChoice, node_of, node_of_record
from shared.desired_state import AfterDrain, DesiredRank, DesiredState, Drain, RollingRestart
from shared.rank_names import names_of
from shared.types import Incarnation, NodeId, RankId

DEFAULT_GRACE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """`num_ranks` ranks shall exist. Fewer: those in `leaving` go, or else the highest; more: those
    in `coming`, or else the lowest free numbers, on `node` or where there is most room."""

    num_ranks: int
    grace_s: float = DEFAULT_GRACE_S
    leaving: tuple[RankId, ...] = ()
    coming: tuple[RankId, ...] = ()
    node: NodeId = NodeId("")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRanks:
    """These ranks leave the map, and wait outside it until they are undrained, or as `after`
    says."""

    ranks: tuple[RankId, ...]
    grace_s: float = DEFAULT_GRACE_S
    after: AfterDrain = AfterDrain.STAY


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainNode:
    """All ranks that run on the node now, or shall run there."""

    node: NodeId
    grace_s: float = DEFAULT_GRACE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Undrain:
    """Takes the drains of these ranks back, whoever asked for them. One that was about to leave for
    good, or to move, stays where it runs; refused if its place there is another rank's by now. One
    that runs nowhere any more starts where there is room."""

    ranks: tuple[RankId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UndrainNode:
    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace:
    """The rank moves to another node (or, with the node that it has, to a new process)."""

    rank: RankId
    node: NodeId
    grace_s: float = DEFAULT_GRACE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartRanks:
    """A new process for each of these ranks, one after the other; empty: for all of them."""

    ranks: tuple[RankId, ...] = ()
    grace_s: float = DEFAULT_GRACE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRestart:
    """The rolling restart goes no further; a rank that is being restarted comes back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseVerdicts:
    """No verdicts but on processes that are seen to have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeVerdicts:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalance:
    """Plan the placement anew now, without waiting until nothing has changed for a while."""


Change = (
    Scale
    | DrainRanks
    | DrainNode
    | Undrain
    | UndrainNode
    | Replace
    | RestartRanks
    | StopRestart
    | PauseVerdicts
    | ResumeVerdicts
    | Rebalance
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Nothing was changed. `reason` is a sentence for people, `needed` what would make the change
    possible; empty if nothing would."""

    reason: str
    needed: str = ""

    @property
    def text(self) -> str:
        return f"{self.reason}; {self.needed}" if self.needed else self.reason


def change_desired(
    state: ClusterState, change: Change, now: float, *, request_id: str = "", digest: str = ""
) -> DesiredState | Refusal:
    """The desired state with `change`. `now` is in Unix seconds. If `request_id` was seen before,
    or there is nothing to change, the result equals `state.desired` and needs no write. `digest` is
    of all that the request asks for: one that has asked for something else is no repetition."""
    desired = state.desired
    if reused := why_reused(desired, request_id, digest):
        return Refusal(reason=reused, needed="pass another one; only the same may be repeated")
    if request_id and request_id in desired.requests:
        return desired
    if state.spec is None:
        return Refusal(
            reason="the instance has not been described yet",
            needed="wait until a control plane leads",
        )
    result = _Changer(state, now).apply(change)
    if isinstance(result, Refusal):
        return result
    changed = result != desired
    if not changed and not request_id:
        return desired
    result = replace(result, change=desired.change + changed)
    if not request_id:
        return result
    return with_request(result, request_id, digest, num_ranks=state.spec.num_ranks)


class _Changer:
    def __init__(self, state: ClusterState, now: float) -> None:
        assert state.spec is not None
        self._state = state
        self._desired = state.desired
        self._now = now
        self._num_ranks = state.spec.num_ranks
        self._ranks = state.desired.rank_ids(state.spec.num_ranks)
        self._capacity = Capacity(state)

    def apply(self, change: Change) -> DesiredState | Refusal:
        match change:
            case Scale():
                return self._scale(change)
            case DrainRanks():
                return self._drain(change.ranks, change.grace_s, change.after)
            case DrainNode():
                ranks = self._ranks_of(change.node)
                if not ranks:
                    return self._no_node(change.node)
                return self._drain(ranks, change.grace_s, AfterDrain.STAY)
            case Undrain():
                return self._undrain(change.ranks)
            case UndrainNode():
                return self._undrain_node(change.node)
            case Replace():
                return self._replace(change)
            case RestartRanks():
                return self._restart(change)
            case StopRestart():
                return replace(self._desired, restart=None)
            case PauseVerdicts():
                return replace(self._desired, verdicts_paused=True)
            case ResumeVerdicts():
                return replace(self._desired, verdicts_paused=False)
            case Rebalance():
                return replace(self._desired, rebalances=self._desired.rebalances + 1)

    # Scale.

    def _scale(self, change: Scale) -> DesiredState | Refusal:
        if change.num_ranks < 1:
            return Refusal(reason="an instance has at least one rank")
        known = set(self._ranks)
        if unknown := sorted(set(change.leaving) - known):
            return self._no_rank(unknown)
        leaving = sorted(set(change.leaving))
        num_leaving = len(known) - change.num_ranks
        if leaving and len(leaving) != num_leaving:
            return Refusal(
                reason=f"{len(leaving)} ranks are named, but from {len(known)} to "
                f"{change.num_ranks} {max(num_leaving, 0)} leave",
            )
        if num_leaving > 0:
            highest = sorted(known)[-num_leaving:]
            return self._shrink(leaving or highest, change.grace_s)
        return self._grow(-num_leaving, change)

    def _grow(self, num_new: int, change: Scale) -> DesiredState | Refusal:
        if num_new == 0:
            return self._desired
        new = self._numbers(num_new, change.coming)
        if isinstance(new, Refusal):
            return new
        node = change.node
        choice = NodeChoice(self._state)
        if node and node not in choice.nodes:
            return _no_agent(node, choice)
        ranks, records = list(self._explicit_ranks()), self._state.newest_records()
        base = self._desired
        for rank in new:
            runs_on = records[rank].node if rank in records else None
            if runs_on in choice.nodes and node in ("", runs_on):
                where: NodeId | None = runs_on  # it was about to leave, and stays
            else:
                where = choice.take(rank, node)
            if where is None:
                return Refusal(
                    reason=f"{f'node {node!r}' if node else 'no node'} has "
                    f"{'no ' if node else ''}room for rank {rank}",
                    needed=choice.what_is_needed,
                )
            ranks.append(DesiredRank(rank=rank, node=where))
            if runs_on in (None, where):
                base = base.without_drain(rank)  # else its process leaves first
        return replace(base, ranks=_sorted(ranks))

    def _numbers(self, num_new: int, coming: Collection[RankId]) -> Collection[RankId] | Refusal:
        limit = rank_limit(self._state)
        free = [RankId(rank) for rank in range(limit) if rank not in self._ranks]
        if len(free) < num_new or any(rank >= limit for rank in coming):
            return Refusal(
                reason=f"the instance was started with room for {limit} ranks, 0 to {limit - 1}",
                needed="start it with a higher --ranks-max",
            )
        if taken := sorted(set(coming) & set(self._ranks)):
            return Refusal(
                reason=f"{names_of(taken)} {'exists' if len(taken) == 1 else 'exist'} already",
                needed=f"name another, such as {free[0]}; `starfish replace` moves a rank",
            )
        return sorted(set(coming)) or free[:num_new]

    def _shrink(self, leaving: Collection[RankId], grace_s: float) -> DesiredState | Refusal:
        if refusal := self._capacity.refuse_without(leaving):
            return Refusal(reason=refusal[0], needed=refusal[1])
        kept = [each for each in self._explicit_ranks() if each.rank not in leaving]
        base = replace(self._desired, ranks=_sorted(kept), restart=self._restart_without(leaving))
        return self._with_drains(base, leaving, grace_s, AfterDrain.LEAVE)

    # Drains.

    def _drain(
        self, ranks: Collection[RankId], grace_s: float, after: AfterDrain
    ) -> DesiredState | Refusal:
        if unknown := sorted(set(ranks) - set(self._ranks)):
            return self._no_rank(unknown)
        if refusal := self._capacity.refuse_without(ranks):
            return Refusal(reason=refusal[0], needed=refusal[1])
        base = self._desired
        if after is AfterDrain.LEAVE:
            kept = [each for each in self._explicit_ranks() if each.rank not in ranks]
            base = replace(base, ranks=_sorted(kept), restart=self._restart_without(ranks))
        return self._with_drains(base, ranks, grace_s, after)

    def _undrain(self, ranks: Collection[RankId]) -> DesiredState | Refusal:
        drained = {drain.rank for drain in self._desired.drains}
        if unknown := sorted(set(ranks) - drained - set(self._ranks)):
            return self._no_rank(unknown)
        drains = tuple(drain for drain in self._desired.drains if drain.rank not in ranks)
        if not self._desired.ranks:
            return replace(self._desired, drains=drains)
        choice = NodeChoice(self._state)
        back: dict[RankId, NodeId] = {}
        for drain in [d for d in self._desired.drains if d.rank in ranks]:
            rank, to = drain.rank, self._desired.node_of(drain.rank)
            node = self._place_back(rank, choice)
            if node is None and not to:
                return Refusal(
                    reason=f"no node has room for rank {rank}", needed=choice.what_is_needed
                )
            if node is None and drain.after is AfterDrain.LEAVE:
                return _place_is_taken(rank, node_of_record(self._state, rank), to)
            if node is None:  # it was drained while it moved: it serves where it moves to
                drains = (*drains, replace(drain, after=AfterDrain.LEAVE))
            back[rank] = node or to
        others = [each for each in self._desired.ranks if each.rank not in back]
        kept = [DesiredRank(rank=rank, node=node) for rank, node in back.items()]
        drains = tuple(sorted(drains, key=lambda drain: drain.rank))
        return replace(self._desired, drains=drains, ranks=_sorted([*others, *kept]))

    def _place_back(self, rank: RankId, choice: NodeChoice) -> NodeId | None:
        """Where a rank serves that is drained no more: where it runs, or was to run, or else where
        there is room. None if its place is another rank's by now, or if there is no room."""
        to, at = self._desired.node_of(rank), node_of_record(self._state, rank)
        is_moving = at != to and at in choice.nodes
        if to and at and is_moving:
            return choice.take(rank, at)
        return at or to or choice.take(rank)

    def _undrain_node(self, node: NodeId) -> DesiredState | Refusal:
        ranks = self._ranks_of(node)
        if not ranks:
            return self._no_node(node)
        return self._undrain(ranks)

    def _replace(self, change: Replace) -> DesiredState | Refusal:
        rank = change.rank
        if rank not in self._ranks:
            return self._no_rank([rank])
        choice = NodeChoice(self._state)
        if change.node not in choice.nodes:
            return _no_agent(change.node, choice)
        if change.node == node_of(self._state, rank):
            return self._drain((rank,), change.grace_s, AfterDrain.RESTART)
        if refusal := self._capacity.refuse_without((rank,)):
            return Refusal(reason=refusal[0], needed=refusal[1])
        if choice.take(rank, change.node) is None:
            return Refusal(
                reason=f"node {change.node!r} has no room for rank {rank}",
                needed=choice.what_is_needed,
            )
        ranks = [each for each in self._explicit_ranks() if each.rank != rank]
        ranks.append(DesiredRank(rank=rank, node=change.node))
        base = replace(self._desired, ranks=_sorted(ranks))
        return self._with_drains(base, (rank,), change.grace_s, AfterDrain.LEAVE)

    def _with_drains(
        self, base: DesiredState, ranks: Collection[RankId], grace_s: float, after: AfterDrain
    ) -> DesiredState:
        """A drain that is there already keeps its time if nothing else about it changes."""
        for rank in sorted(ranks):
            old = base.drain_of(rank)
            if old is not None and old.after is after and old.grace_s <= grace_s:
                continue
            base = base.with_drain(new_drain(self._state, rank, self._now, grace_s, after))
        return base

    # Restart.

    def _restart(self, change: RestartRanks) -> DesiredState | Refusal:
        ranks = change.ranks or self._ranks
        if unknown := sorted(set(ranks) - set(self._ranks)):
            return self._no_rank(unknown)
        for rank in ranks:
            if refusal := self._capacity.refuse_without((rank,)):
                return Refusal(reason=refusal[0], needed=refusal[1])
        restart = RollingRestart(ranks=tuple(ranks), requested_at=self._now, grace_s=change.grace_s)
        return replace(self._desired, restart=restart)

    def _restart_without(self, ranks: Collection[RankId]) -> RollingRestart | None:
        restart = self._desired.restart
        if restart is None:
            return None
        left = tuple(rank for rank in restart.ranks if rank not in ranks)
        return replace(restart, ranks=left) if left else None

    # What is there.

    def _no_rank(self, unknown: Collection[int]) -> Refusal:
        verb = "does" if len(unknown) == 1 else "do"
        return Refusal(
            reason=f"{names_of(unknown)} {verb} not exist",
            needed=f"this instance has {names_of(self._ranks)}",
        )

    def _no_node(self, node: NodeId) -> Refusal:
        nodes = sorted({node_of(self._state, rank) for rank in self._ranks} - {NodeId("")})
        known = f"ranks run on {', '.join(nodes)}" if nodes else "no node has any"
        return Refusal(reason=f"no rank runs on node {node!r}", needed=known)

    def _explicit_ranks(self) -> tuple[DesiredRank, ...]:
        """All ranks by name, with the node that each runs on or shall run on."""
        return tuple(
            DesiredRank(rank=rank, node=node_of(self._state, rank)) for rank in self._ranks
        )

    def _ranks_of(self, node: NodeId) -> tuple[RankId, ...]:
        records = self._state.newest_records()
        here = {RankId(rank) for rank, record in records.items() if record.node == node}
        wanted = {rank for rank in self._ranks if node_of(self._state, rank) == node}
        return tuple(sorted((here | wanted) & set(self._ranks)))


def new_drain(
    state: ClusterState, rank: RankId, now: float, grace_s: float, after: AfterDrain
) -> Drain:
    """Of the incarnation that is registered now. `now` is in Unix seconds."""
    record = state.newest_records().get(rank)
    return Drain(
        rank=rank,
        incarnation=record.incarnation if record is not None else Incarnation(0),
        requested_at=now,
        grace_s=grace_s,
        after=after,
    )


def _place_is_taken(rank: RankId, node: NodeId, to: NodeId) -> Refusal:
    return Refusal(
        reason=f"rank {rank} is on its way to node {to!r}, and another rank has been given its "
        f"place on node {node!r}",
        needed=f"let it move, and replace it back when node {node!r} has room",
    )


def _no_agent(node: NodeId, choice: NodeChoice) -> Refusal:
    known = ", ".join(choice.nodes) or "no node"
    return Refusal(
        reason=f"no agent runs on node {node!r}",
        needed=f"start a node agent there (agents run on {known})",
    )


def _sorted(ranks: Iterable[DesiredRank]) -> tuple[DesiredRank, ...]:
    return tuple(sorted(ranks, key=lambda each: each.rank))
