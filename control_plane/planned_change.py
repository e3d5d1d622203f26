"""Carries the desired state out: which drained members leave the map now, and how the desired state
itself goes on when a part of it is done. Pure; `Membership` asks, and makes the writes.

Theory of operation. A change on purpose is a record in etcd, and each step of it follows from what
etcd shows, so whoever leads next goes on with it. Only how long a member has served nobody is
remembered: a new leader waits for that again.

    what is seen                                      | what follows
    --------------------------------------------------+----------------------------------------------
    a drained member serves nobody (two Pongs, and    | it leaves: `leavers`. Membership first has
    everybody has had time to hear of the drain), or  | the experts that it alone holds loaded
    its grace and some time more have passed          | elsewhere, then publishes a map without it
    RESTART: a new process of the rank registered     | its drain is done
    LEAVE: the rank is gone, or runs where it shall   | its drain is done
    STAY                                              | stays until somebody undrains the rank
    a rank, or a node's agent, says that it leaves    | a drain with RESTART
    a rolling restart, the instance is whole          | a drain with RESTART of its next rank
    a member has been a straggler for long            | a drain with STAY, if the policy says so
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from control_plane.capacity import Capacity
from control_plane.cluster_state import ClusterState
from control_plane.desired_changes import new_drain
from control_plane.residency import is_to_leave
from control_plane.straggler_watch import StragglerWatch
from control_plane.writes import PublishDesired
from shared.desired_state import AfterDrain, DesiredState, Drain
from shared.types import Member, RankId
from shared.wire import Pong

_IDLE_PONGS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainPolicy:
    settle_s: float = 1.0  # gateways have heard of a drain by then
    overdue_s: float = 30.0  # after the grace: sessions that nobody has moved
    leaving_grace_s: float = 10.0  # for ranks and nodes that were told to end
    straggler_after_s: float = 0.0  # a member that slows the others for so long; 0: never
    straggler_grace_s: float = 30.0


@dataclass(slots=True)
class _Draining:
    seen_at: float
    idle_pongs: int = 0


class PlannedChange:
    """`now` is in monotonic seconds, `unix_now` in Unix seconds."""

    def __init__(self, policy: DrainPolicy) -> None:
        self._policy = policy
        self._draining: dict[Member, _Draining] = {}
        self._stragglers = StragglerWatch(policy.straggler_after_s)

    def on_pong(self, member: Member, pong: Pong, now: float) -> None:
        """It says how many sessions a member has, and how long the others wait for it."""
        self._stragglers.on_pong(member, pong, now)
        draining = self._draining.get(member)
        if draining is not None:
            is_idle = pong.load.running + pong.load.waiting == 0
            draining.idle_pongs = draining.idle_pongs + 1 if is_idle else 0

    def leavers(
        self, state: ClusterState, members: Iterable[Member], now: float
    ) -> tuple[Member, ...]:
        """The members that are to leave the map now."""
        wanted = [m for m in members if is_to_leave(state, m)] if state.desired.drains else []
        kept = self._draining
        self._draining = {m: kept.get(m) or _Draining(seen_at=now) for m in wanted}
        return tuple(m for m, draining in self._draining.items() if self._is_due(state, m, now))

    def _is_due(self, state: ClusterState, member: Member, now: float) -> bool:
        draining, drain = self._draining[member], state.desired.drain_of(member.rank)
        assert drain is not None, "it would not be to leave"
        waited_s = now - draining.seen_at
        is_idle = draining.idle_pongs >= _IDLE_PONGS and waited_s >= self._policy.settle_s
        return is_idle or waited_s >= drain.grace_s + self._policy.overdue_s

    def next_desired(
        self, state: ClusterState, unix_now: float, *, is_whole: bool
    ) -> PublishDesired | None:
        """What the desired state becomes now that a part of it is done; None if nothing is.
        `is_whole`: all ranks that are wanted serve, and nothing is left to be moved."""
        desired, done = _without_done(state)
        desired, leaving = self._with_leaving(replace(state, desired=desired), unix_now)
        desired, begun = _with_restart(replace(state, desired=desired), unix_now, is_whole=is_whole)
        desired, slow = self._without_straggler(replace(state, desired=desired), unix_now)
        if desired == state.desired:
            return None
        return PublishDesired(desired=desired, cause="; ".join((*done, *leaving, *begun, *slow)))

    def _with_leaving(
        self, state: ClusterState, unix_now: float
    ) -> tuple[DesiredState, tuple[str, ...]]:
        """Drains of the ranks that were told to end, or whose whole node was, if the others can do
        without them. A rank that ends leaves room for a new process: hence RESTART."""
        records, agents = state.records.values(), state.agents.values()
        if not any(r.leaving for r in records) and not any(a.leaving for a in agents):
            return state.desired, ()
        newest = state.newest_records()
        nodes = {agent.node for agent in state.agents.values() if agent.leaving}
        ranks = [
            RankId(rank)
            for rank, record in newest.items()
            if (record.leaving or record.node in nodes)
            and state.desired.drain_of(RankId(rank)) is None
        ]
        if not ranks or Capacity(state).refuse_without(ranks):
            return state.desired, ()
        desired, grace_s = state.desired, self._policy.leaving_grace_s
        for rank in ranks:
            drain = new_drain(state, rank, unix_now, grace_s, AfterDrain.RESTART)
            desired = desired.with_drain(drain)
        return desired, tuple(f"rank {rank} was told to end" for rank in ranks)

    def _without_straggler(
        self, state: ClusterState, unix_now: float
    ) -> tuple[DesiredState, tuple[str, ...]]:
        """A drain of the member that holds the others up, if they can do without it. It stays out
        until somebody undrains it: what is slow there is not known here. At most half of the ranks
        are out at a time, and none is taken out while verdicts are paused."""
        desired, expert_map, spec = state.desired, state.expert_map, state.spec
        if expert_map is None or spec is None or desired.verdicts_paused:
            return desired, ()
        overdue = self._stragglers.overdue(expert_map.members)
        if overdue is None:
            return desired, ()
        (member, late_ms), ranks = overdue, desired.rank_ids(spec.num_ranks)
        if (
            2 * (len(desired.drains) + 1) > len(ranks)
            or desired.drain_of(member.rank) is not None
            or Capacity(state).refuse_without((member.rank,))
        ):
            return desired, ()
        grace_s = self._policy.straggler_grace_s
        drain = new_drain(state, member.rank, unix_now, grace_s, AfterDrain.STAY)
        why = f"rank {member.rank} is slow: others wait {late_ms:.0f} ms for it in each step"
        return desired.with_drain(drain), (why,)


def _without_done(state: ClusterState) -> tuple[DesiredState, tuple[str, ...]]:
    desired, done = state.desired, []
    for drain in state.desired.drains:
        if not _is_done(state, drain):
            continue
        desired = desired.without_drain(drain.rank)
        done.append(f"rank {drain.rank}: {drain.after.value} is done")
        restart = desired.restart
        if restart is not None and drain.after is AfterDrain.RESTART:
            left = tuple(rank for rank in restart.ranks if rank != drain.rank)
            desired = replace(desired, restart=replace(restart, ranks=left) if left else None)
    return desired, tuple(done)


def _is_done(state: ClusterState, drain: Drain) -> bool:
    """Level-triggered: whoever looks, whenever, sees the same."""
    if drain.after is AfterDrain.STAY or state.spec is None:
        return False
    record = state.newest_records().get(drain.rank)
    expert_map = state.expert_map
    in_map = None if expert_map is None else expert_map.incarnation_of(drain.rank)
    if in_map is not None and is_to_leave(state, Member(rank=drain.rank, incarnation=in_map)):
        return False
    if record is not None:
        return not is_to_leave(state, record.member)
    is_wanted = drain.rank in state.desired.rank_ids(state.spec.num_ranks)
    return drain.after is AfterDrain.LEAVE and not is_wanted


def _with_restart(
    state: ClusterState, unix_now: float, *, is_whole: bool
) -> tuple[DesiredState, tuple[str, ...]]:
    """One rank at a time. Its place in the list ends with its drain."""
    desired, restart = state.desired, state.desired.restart
    if restart is None or state.spec is None:
        return desired, ()
    wanted = set(desired.rank_ids(state.spec.num_ranks))
    drained = {drain.rank: drain.after for drain in desired.drains}
    left = tuple(
        rank
        for rank in restart.ranks
        if rank in wanted and drained.get(rank) is not AfterDrain.STAY
    )
    if not left:
        return replace(desired, restart=None), ("the rolling restart is done",)
    if left != restart.ranks:
        desired = replace(desired, restart=replace(restart, ranks=left))
    if not is_whole or drained.get(left[0]) is not None or Capacity(state).refuse_without(left[:1]):
        return desired, ()
    drain = new_drain(state, left[0], unix_now, restart.grace_s, AfterDrain.RESTART)
    return desired.with_drain(drain), (f"rank {left[0]} is restarted next",)
