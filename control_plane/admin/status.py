"""What `GET /v1/status` answers: the instance at one moment, as the control plane sees it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from control_plane.cluster_state import ClusterState
from control_plane.healing import RebalanceProgress
from control_plane.node_choice import node_of
from control_plane.placement import advise, compute_fault_tolerance, describe
from shared.change_progress import Seen, Step, is_in_progress
from shared.desired_state import Drain
from shared.records import RankRecord
from shared.types import Member, NodeId, RankId
from shared.wire import Load


class LeaderStatus(msgspec.Struct, kw_only=True):
    control_plane: str
    term: int
    since: float  # Unix seconds
    admin_url: str


class DrainStatus(msgspec.Struct, kw_only=True):
    """`after` says what becomes of the rank: stay, restart or leave."""

    after: str
    requested_at: float  # Unix seconds
    grace_s: float


class LoadStatus(msgspec.Struct, kw_only=True):
    """`tokens` are those of running and waiting sessions. `kv_blocks_free` counts cached blocks
    that no session uses. `step_ms` is an average step, of which the rank waits `waited_ms` for
    peers; 0: not known."""

    running: int
    waiting: int
    tokens: int
    kv_blocks: int
    kv_blocks_free: int
    step_ms: float
    waited_ms: float


class RankStatus(msgspec.Struct, kw_only=True):
    """`state` is "live" for a member of the map and "draining" for one that is to leave it, or
    "dead" for one whose process is not registered, or that a verdict has ended; outside of the map
    "drained", "starting", "ready", "refused" if its release and the leader's cannot serve together,
    or "absent" if no process has registered. `desired`: the rank shall exist, on `desired_node` if
    one is named. `process` is the first incarnation of the process that is registered: it lasts as
    long as the process. `sessions_left` and `load` are null if they are not known, `process` and
    `version` (of Starfish) if no process has registered."""

    rank: int
    state: str
    node: str
    incarnation: int | None
    in_map: bool
    desired: bool
    desired_node: str
    process: int | None
    drain: DrainStatus | None
    sessions_left: int | None
    safe_to_terminate: bool
    load: LoadStatus | None
    version: str | None


class VerdictStatus(msgspec.Struct, kw_only=True):
    """`cause` is that of the first signal, or "drained"; `epoch` that of the map without the rank;
    `decided_ms` the time from the first signal to the verdict."""

    rank: int
    incarnation: int
    cause: str
    epoch: int
    decided_ms: float


class ChangeStatus(msgspec.Struct, kw_only=True):
    """`number` grows with every change that somebody asked for. `steps` are what is not done yet.
    A step of the kind "recover" is no part of a change. `restart` are the ranks to which a rolling
    restart is still to come."""

    number: int
    in_progress: bool
    steps: tuple[Step, ...]
    restart: tuple[int, ...]


class RebalanceStatus(msgspec.Struct, kw_only=True):
    """`asked` counts the rebalances that were asked for, `done` those after which nothing is worth
    a move, as far as the leader knows. `num_steps`: how many steps it has planned for the newest
    one of them."""

    asked: int
    done: int
    num_steps: int


class Survival(msgspec.Struct, kw_only=True):
    """How many failures the map survives without a reload, and with one."""

    rank_failures: int
    node_failures: int
    rank_failures_with_reload: int
    node_failures_with_reload: int
    summary: str


class StatusAnswer(msgspec.Struct, kw_only=True):
    """`leader` is null if nobody leads: serving goes on, but nothing changes. `verdicts_paused`:
    somebody has asked for it; `frozen`: most leases have expired at once. `verdicts` are those of
    about the last ten minutes, by epoch, at most 64 of them. `can_kill`: `/v1/kill` is allowed."""

    instance: str
    epoch: int
    cause: str
    leader: LeaderStatus | None
    verdicts_paused: bool
    frozen: bool
    ranks: tuple[RankStatus, ...]
    verdicts: tuple[VerdictStatus, ...]
    change: ChangeStatus
    rebalance: RebalanceStatus
    survives: Survival | None
    can_kill: bool


_VERDICTS_MAX = 64
LoadOf = Callable[[Member], Load | None]


def status_of(
    state: ClusterState,
    load_of: LoadOf,
    now: float,
    *,
    frozen: bool,
    survives: Survival | None,
    can_kill: bool,
    rebalance: RebalanceProgress,
) -> StatusAnswer:
    """`now` is in Unix seconds."""
    expert_map, leader = state.expert_map, state.leader
    seen = _seen(state, load_of)
    left = seen.steps(now)
    return StatusAnswer(
        instance=state.keys.instance,
        epoch=expert_map.epoch if expert_map is not None else 0,
        cause=expert_map.cause if expert_map is not None else "",
        leader=LeaderStatus(
            control_plane=leader.control_plane,
            term=leader.term,
            since=leader.since,
            admin_url=leader.admin_url,
        )
        if leader is not None
        else None,
        verdicts_paused=state.desired.verdicts_paused,
        frozen=frozen,
        ranks=_Ranks(state, seen, load_of).all(),
        verdicts=_verdicts(state),
        change=ChangeStatus(
            number=state.desired.change,
            in_progress=is_in_progress(left),
            steps=left,
            restart=state.desired.restart.ranks if state.desired.restart is not None else (),
        ),
        rebalance=RebalanceStatus(
            asked=state.desired.rebalances, done=rebalance.done, num_steps=rebalance.num_steps
        ),
        survives=survives,
        can_kill=can_kill,
    )


def survival_of(state: ClusterState) -> Survival | None:
    """None without a map. Takes some 100 ms for a large instance."""
    expert_map = state.expert_map
    if expert_map is None:
        return None
    records = state.records
    nodes = {
        member.rank: records[member].node if member in records else NodeId("unknown")
        for member in expert_map.members
    }
    found = compute_fault_tolerance(expert_map, nodes)
    return Survival(
        rank_failures=found.rank_failures,
        node_failures=found.node_failures,
        rank_failures_with_reload=found.rank_failures_with_reload,
        node_failures_with_reload=found.node_failures_with_reload,
        summary=describe(found, advise(expert_map, nodes)),
    )


def _seen(state: ClusterState, load_of: LoadOf) -> Seen:
    def sessions_of(member: Member) -> int | None:
        load = load_of(member)
        return None if load is None else load.running + load.waiting

    return Seen(
        num_ranks=state.spec.num_ranks if state.spec is not None else 0,
        desired=state.desired,
        expert_map=state.expert_map,
        records=state.records,
        verdicts=tuple(state.verdicts.values()),
        sessions_of=sessions_of,
        agents=tuple(state.agents.values()),
    )


class _Ranks:
    def __init__(self, state: ClusterState, seen: Seen, load_of: LoadOf) -> None:
        self._state = state
        self._seen = seen
        self._load_of = load_of
        self._refused = {member.rank: record for member, record in sorted(state.refused.items())}
        self._records = self._refused | dict(state.newest_records())
        self._desired = state.desired.rank_ids(state.spec.num_ranks if state.spec else 0)

    def all(self) -> tuple[RankStatus, ...]:
        state = self._state
        members = state.expert_map.members if state.expert_map is not None else ()
        known = {
            *self._desired,
            *(drain.rank for drain in state.desired.drains),
            *(member.rank for member in (*state.records, *state.refused, *members)),
        }
        return tuple(self._one(rank) for rank in sorted(known))

    def _one(self, rank: RankId) -> RankStatus:
        state = self._state
        member, record = self._seen.member_of(rank), self._records.get(rank)
        drain = state.desired.drain_of(rank)
        incarnation = member.incarnation if member is not None else None
        if incarnation is None and record is not None:
            incarnation = record.incarnation
        return RankStatus(
            rank=rank,
            state=self._word(rank, member, record, is_drained=drain is not None),
            node=record.node if record is not None else node_of(state, rank),
            incarnation=incarnation,
            in_map=member is not None,
            desired=rank in self._desired,
            desired_node=state.desired.node_of(rank),
            process=None if record is None else record.first_incarnation or record.incarnation,
            drain=None if drain is None else _drain_status(drain),
            sessions_left=self._seen.sessions_left(rank),
            safe_to_terminate=self._seen.is_safe_to_terminate(rank),
            load=None if member is None else _load_status(self._load_of(member)),
            version=record.release.version if record is not None else None,
        )

    def _word(
        self, rank: RankId, member: Member | None, record: RankRecord | None, *, is_drained: bool
    ) -> str:
        if member is not None:
            if member not in self._state.records or member in self._state.verdicts:
                return "dead"
            return "draining" if is_drained else "live"
        if record is not None and record is self._refused.get(rank):
            return "refused"
        if is_drained:
            return "drained"
        return "absent" if record is None else record.state.value


def _drain_status(drain: Drain) -> DrainStatus:
    return DrainStatus(
        after=drain.after.value, requested_at=drain.requested_at, grace_s=drain.grace_s
    )


def _load_status(load: Load | None) -> LoadStatus | None:
    if load is None:
        return None
    return LoadStatus(
        running=load.running,
        waiting=load.waiting,
        tokens=load.tokens,
        kv_blocks=load.kv_blocks,
        kv_blocks_free=load.kv_blocks_free,
        step_ms=load.step_ms,
        waited_ms=load.waited_ms,
    )


def _verdicts(state: ClusterState) -> tuple[VerdictStatus, ...]:
    ordered = sorted(state.verdicts.values(), key=lambda verdict: (verdict.epoch, verdict.rank))
    return tuple(
        VerdictStatus(
            rank=verdict.rank,
            incarnation=verdict.incarnation,
            cause=verdict.cause.value,
            epoch=verdict.epoch,
            decided_ms=(verdict.decided_at - verdict.first_signal_at) * 1000,
        )
        for verdict in ordered[-_VERDICTS_MAX:]
    )
