"""What is still to be done of the changes that people asked for, in words. Pure."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import msgspec

from control_plane.cluster_state import ClusterState
from shared.desired_state import AfterDrain, Drain
from shared.records import RankRecord
from shared.types import Member, RankId, RankState, SuspicionReason
from shared.wire import Load

LoadOf = Callable[[Member], Load | None]


class StepKind(Enum):
    """RECOVER is no part of a change: a rank has died, and comes back by itself."""

    DRAIN = "drain"
    LEAVE = "leave"
    RESTART = "restart"
    JOIN = "join"
    RECOVER = "recover"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not done yet. `text` says what it waits for."""

    kind: StepKind
    rank: RankId
    text: str


def steps(state: ClusterState, load_of: LoadOf, now: float) -> tuple[Step, ...]:
    """By rank. `now` is in Unix seconds. None if everything is as it shall be."""
    return _Progress(state, load_of, now).steps()


def sessions_left(state: ClusterState, rank: RankId, load_of: LoadOf) -> int | None:
    """How many sessions the rank has, running and waiting, as its member says; None if it is no
    member or nobody has asked it."""
    member = member_of(state, rank)
    load = load_of(member) if member is not None else None
    return None if load is None else load.running + load.waiting


def member_of(state: ClusterState, rank: RankId) -> Member | None:
    """The incarnation of the rank that the map names."""
    expert_map = state.expert_map
    incarnation = expert_map.incarnation_of(rank) if expert_map is not None else None
    return None if incarnation is None else Member(rank=rank, incarnation=incarnation)


def is_safe_to_terminate(state: ClusterState, rank: RankId) -> bool:
    """Whether its process, or its host, may be ended now without anybody's noticing."""
    return state.desired.drain_of(rank) is not None and member_of(state, rank) is None


class _Progress:
    def __init__(self, state: ClusterState, load_of: LoadOf, now: float) -> None:
        self._state = state
        self._load_of = load_of
        self._now = now
        self._records = state.newest_records()

    def steps(self) -> tuple[Step, ...]:
        desired = self._state.desired
        num_ranks = self._state.spec.num_ranks if self._state.spec is not None else 0
        found = [step for drain in desired.drains if (step := self._of_drain(drain))]
        drained = {drain.rank for drain in desired.drains}
        found += [
            Step(kind=StepKind.RESTART, rank=rank, text=f"rank {rank} waits for its restart")
            for rank in (desired.restart.ranks if desired.restart is not None else ())
            if rank not in drained
        ]
        found += [
            self._of_absent(rank)
            for rank in desired.rank_ids(num_ranks)
            if rank not in drained and member_of(self._state, rank) is None
        ]
        return tuple(sorted(found, key=lambda step: step.rank))

    def _of_drain(self, drain: Drain) -> Step | None:
        rank, is_member = drain.rank, member_of(self._state, drain.rank) is not None
        kind = {
            AfterDrain.STAY: StepKind.DRAIN,
            AfterDrain.RESTART: StepKind.RESTART,
            AfterDrain.LEAVE: StepKind.LEAVE,
        }[drain.after]
        if is_member:
            return Step(kind=kind, rank=rank, text=f"rank {rank} {self._serving_yet(drain)}")
        match drain.after:
            case AfterDrain.STAY:
                return None
            case AfterDrain.RESTART:
                text = f"rank {rank} serves nobody and gets a new process"
            case AfterDrain.LEAVE:
                node = self._state.desired.node_of(rank)
                then = f"; then it starts on {node}" if node else ""
                text = f"rank {rank} serves nobody, its process ends{then}"
        return Step(kind=kind, rank=rank, text=text)

    def _serving_yet(self, drain: Drain) -> str:
        num = sessions_left(self._state, drain.rank, self._load_of)
        if num == 0:
            return "has no sessions left; its experts get another place before it leaves the map"
        sessions = "sessions" if num is None else f"{num} session{'' if num == 1 else 's'}"
        left_s = drain.requested_at + drain.grace_s - self._now
        if left_s > 0:
            return f"has {sessions} left, which may finish there for {left_s:.0f} s"
        return f"has {sessions} left, which move to other ranks"

    def _of_absent(self, rank: RankId) -> Step:
        record = self._records.get(rank)
        kind = StepKind.RECOVER if self._has_died(rank) else StepKind.JOIN
        return Step(kind=kind, rank=rank, text=f"rank {rank} {self._coming(rank, record)}")

    def _coming(self, rank: RankId, record: RankRecord | None) -> str:
        if record is None:
            node = self._state.desired.node_of(rank)
            return f"has not registered yet{f' (on {node})' if node else ''}"
        if record.state is RankState.STARTING:
            return "loads its experts"
        return "has loaded its experts and waits for its links and the next map"

    def _has_died(self, rank: RankId) -> bool:
        verdicts = [v for m, v in self._state.verdicts.items() if m.rank == rank]
        newest = max(verdicts, key=lambda verdict: verdict.incarnation, default=None)
        return newest is not None and newest.cause is not SuspicionReason.DRAINED
