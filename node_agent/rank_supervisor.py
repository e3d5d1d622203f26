"""The phase of each rank of this node, and what to do next. Pure: events and `now` in, actions out;
the driver handles processes and etcd.

A rank waits until it is due and is then started. The driver does this in three steps, each of which
may fail: incarnation, lease, process. The rank runs until its process exits. Then its lease is
revoked, and it waits again for as long as the restart policy says. If a process is seen to die, its
lease is revoked at once, although the kernel may need long to tear it down. The next incarnation
still waits for the exit, because until then the process holds its ports and its GPU memory. A rank
that shall not run here any more is stopped; it leaves STOPPED only if it shall run here again. A
process that is to be replaced is told to end, and is killed if it does not. An incarnation that the
control plane declared dead ends by itself as soon as it learns of it: its process registers as the
next incarnation, or exits. If it can do neither (it hangs, or is stopped), it is killed after a
grace time, so that its rank can start again.

    phase     event         next      action
    waiting   due           starting  Spawn
    waiting   adopted       running   –
    waiting   stop          stopped   –
    starting  spawned       running   –
    starting  spawn_failed  waiting   –
    starting  stop          stopping  –
    running   dying         dying     RevokeLease
    running   exited        waiting   RevokeLease
    running   declared_dead running   Kill, after the grace
    running   registered    running   –, and no Kill if the incarnation is another one
    running   stop          stopping  Terminate
    running   replace       running   Terminate, and Kill after the grace
    dying     exited        waiting   –
    dying     stop          ending    –
    stopping  spawned       stopping  Terminate
    stopping  spawn_failed  stopped   –
    stopping  dying         ending    RevokeLease
    stopping  exited        stopped   RevokeLease
    stopping  stop          stopping  –
    ending    exited        stopped   –
    ending    stop          ending    –
    stopped   stop          stopped   –
    stopped   wanted        waiting   –
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum

from node_agent.desired_ranks import RunningProcess
from node_agent.restart_policy import RestartPolicy
from shared.types import Incarnation, Member, RankId


class RankPhase(Enum):
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    DYING = "dying"
    STOPPING = "stopping"
    ENDING = "ending"
    STOPPED = "stopped"


class RankEvent(Enum):
    DUE = "due"
    ADOPTED = "adopted"
    SPAWNED = "spawned"
    SPAWN_FAILED = "spawn_failed"
    DYING = "dying"
    EXITED = "exited"
    STOP = "stop"
    WANTED = "wanted"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRank:
    """A running process of a rank, and its lease."""

    member: Member
    lease_id: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWait:
    """For a rank's next process, until this time, after so many short runs in a row."""

    until: float
    failures: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    rank: RankId


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeLease:
    """The process has exited or is exiting: revoke its lease now."""

    running_rank: RunningRank
    exit_code: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminate:
    running_rank: RunningRank


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """The rank was declared dead, or told to end, and did not exit by itself."""

    running_rank: RunningRank


SupervisorAction = Spawn | RevokeLease | Terminate | Kill

TRANSITIONS: dict[tuple[RankPhase, RankEvent], RankPhase] = {
    (RankPhase.WAITING, RankEvent.DUE): RankPhase.STARTING,
    (RankPhase.WAITING, RankEvent.ADOPTED): RankPhase.RUNNING,
    (RankPhase.WAITING, RankEvent.STOP): RankPhase.STOPPED,
    (RankPhase.STARTING, RankEvent.SPAWNED): RankPhase.RUNNING,
    (RankPhase.STARTING, RankEvent.SPAWN_FAILED): RankPhase.WAITING,
    (RankPhase.STARTING, RankEvent.STOP): RankPhase.STOPPING,
    (RankPhase.RUNNING, RankEvent.DYING): RankPhase.DYING,
    (RankPhase.RUNNING, RankEvent.EXITED): RankPhase.WAITING,
    (RankPhase.RUNNING, RankEvent.STOP): RankPhase.STOPPING,
    (RankPhase.DYING, RankEvent.EXITED): RankPhase.WAITING,
    (RankPhase.DYING, RankEvent.STOP): RankPhase.ENDING,
    (RankPhase.STOPPING, RankEvent.SPAWNED): RankPhase.STOPPING,
    (RankPhase.STOPPING, RankEvent.SPAWN_FAILED): RankPhase.STOPPED,
    (RankPhase.STOPPING, RankEvent.DYING): RankPhase.ENDING,
    (RankPhase.STOPPING, RankEvent.EXITED): RankPhase.STOPPED,
    (RankPhase.STOPPING, RankEvent.STOP): RankPhase.STOPPING,
    (RankPhase.ENDING, RankEvent.EXITED): RankPhase.STOPPED,
    (RankPhase.ENDING, RankEvent.STOP): RankPhase.ENDING,
    (RankPhase.STOPPED, RankEvent.STOP): RankPhase.STOPPED,
    (RankPhase.STOPPED, RankEvent.WANTED): RankPhase.WAITING,
}

_LEASE_REVOKED = frozenset({RankPhase.DYING, RankPhase.ENDING})


@dataclass(slots=True)
class _SupervisedRank:
    due_at: float
    phase: RankPhase = RankPhase.WAITING
    running_rank: RunningRank | None = None
    last_incarnation: Incarnation = Incarnation(0)
    first_incarnation: Incarnation = Incarnation(0)  # of the process
    is_told_to_end: bool = False
    running_since: float = 0.0
    kill_at: float | None = None
    failures: int = 0


class RankSupervisor:
    """All ranks of one node, those that it shall run no more included. An event that is not in the
    table is a bug of the driver: KeyError."""

    def __init__(
        self,
        ranks: Iterable[RankId],
        policy: RestartPolicy,
        rng: random.Random,
        now: float,
        *,
        verdict_grace_s: float = 5.0,
        stop_grace_s: float = 5.0,
    ) -> None:
        """A process may take `verdict_grace_s` to go on after a verdict, and `stop_grace_s` to end
        once it is told to, before it is killed."""
        self._policy = policy
        self._stop_grace_s = stop_grace_s
        self._verdict_grace_s = verdict_grace_s
        self._rng = rng
        self._ranks = {rank: _SupervisedRank(due_at=now) for rank in ranks}

    @property
    def all_stopped(self) -> bool:
        return all(rank.phase is RankPhase.STOPPED for rank in self._ranks.values())

    @property
    def ranks(self) -> tuple[RankId, ...]:
        return tuple(self._ranks)

    def owns(self, rank: RankId) -> bool:
        return rank in self._ranks

    def phase_of(self, rank: RankId) -> RankPhase:
        return self._ranks[rank].phase

    def last_incarnation(self, rank: RankId) -> Incarnation:
        """The highest that a process of ours has had; 0 before the first."""
        return self._ranks[rank].last_incarnation

    def processes(self) -> list[RunningProcess]:
        return [
            RunningProcess(
                rank=rank_id,
                first=rank.first_incarnation,
                newest=rank.running_rank.member.incarnation,
            )
            for rank_id, rank in self._ranks.items()
            if rank.running_rank is not None
        ]

    def running(self) -> list[RunningRank]:
        return [rank.running_rank for rank in self._ranks.values() if rank.running_rank is not None]

    def alive(self) -> list[RunningRank]:
        """The running ranks whose processes are not exiting, as far as is known."""
        ranks = self._ranks.values()
        return [
            r.running_rank
            for r in ranks
            if r.running_rank is not None and r.phase not in _LEASE_REVOKED
        ]

    def next_due_at(self) -> float | None:
        """When `take_due` will next return an action; None if nothing waits for a time."""
        waiting = (r.due_at for r in self._ranks.values() if r.phase is RankPhase.WAITING)
        declared_dead = (r.kill_at for r in self._ranks.values() if r.kill_at is not None)
        return min((*waiting, *declared_dead), default=None)

    def wait_of(self, rank: RankId) -> RankWait | None:
        """None if it does not wait for its next process."""
        found = self._ranks[rank]
        if found.phase is not RankPhase.WAITING:
            return None
        return RankWait(until=found.due_at, failures=found.failures)

    def take_due(self, now: float) -> list[SupervisorAction]:
        actions: list[SupervisorAction] = []
        for rank_id, rank in self._ranks.items():
            if rank.phase is RankPhase.WAITING and rank.due_at <= now:
                self._move(rank, RankEvent.DUE)
                actions.append(Spawn(rank=rank_id))
            elif rank.kill_at is not None and rank.kill_at <= now:
                rank.kill_at = None
                assert rank.running_rank is not None
                actions.append(Kill(running_rank=rank.running_rank))
        return actions

    def on_declared_dead(self, member: Member, now: float) -> list[SupervisorAction]:
        """The control plane has declared this incarnation dead. A repeated verdict does not restart
        the grace time."""
        declared_dead = (
            running_rank for running_rank in self.alive() if running_rank.member == member
        )
        for running_rank in declared_dead:
            rank = self._ranks[running_rank.member.rank]
            if rank.kill_at is None:
                rank.kill_at = now + self._verdict_grace_s
        return []

    def on_adopted(self, running_rank: RunningRank, now: float) -> list[SupervisorAction]:
        """A process that an earlier agent started still runs."""
        return self._set_running(running_rank, RankEvent.ADOPTED, now)

    def on_registered(self, registered: RunningRank) -> list[SupervisorAction]:
        """A record of one of these ranks, in any phase. A process that was fenced may have come
        back as a new incarnation, and one whose lease was lost has taken another."""
        rank = self._ranks[registered.member.rank]
        known = rank.running_rank
        if known is None or known.pid != registered.pid or registered == known:
            return []
        if registered.member.incarnation < known.member.incarnation:
            return []
        rank.running_rank = registered
        rank.last_incarnation = registered.member.incarnation
        if registered.member != known.member and not rank.is_told_to_end:
            rank.kill_at = None
        if rank.phase in _LEASE_REVOKED:
            return [RevokeLease(running_rank=registered, exit_code=None)]
        return []

    def on_spawned(self, running_rank: RunningRank, now: float) -> list[SupervisorAction]:
        return self._set_running(running_rank, RankEvent.SPAWNED, now)

    def on_spawn_failed(self, rank_id: RankId, now: float) -> list[SupervisorAction]:
        rank = self._ranks[rank_id]
        self._move(rank, RankEvent.SPAWN_FAILED)
        self._wait(rank, uptime_s=0.0, exit_code=None, now=now)
        return []

    def on_dying(self, rank_id: RankId, exit_code: int | None) -> list[SupervisorAction]:
        """Its process is exiting; `on_exited` follows."""
        rank = self._ranks[rank_id]
        self._move(rank, RankEvent.DYING)
        assert rank.running_rank is not None
        rank.kill_at = None
        return [RevokeLease(running_rank=rank.running_rank, exit_code=exit_code)]

    def on_exited(
        self, rank_id: RankId, exit_code: int | None, now: float
    ) -> list[SupervisorAction]:
        """`exit_code` is None for an adopted process, which is not our child."""
        rank = self._ranks[rank_id]
        was_revoked = rank.phase in _LEASE_REVOKED
        self._move(rank, RankEvent.EXITED)
        assert rank.running_rank is not None
        running_rank, rank.running_rank, rank.kill_at = rank.running_rank, None, None
        self._wait(rank, uptime_s=now - rank.running_since, exit_code=exit_code, now=now)
        return [] if was_revoked else [RevokeLease(running_rank=running_rank, exit_code=exit_code)]

    def want(self, ranks: Iterable[RankId], now: float) -> None:
        """These shall run here. Those that do, or wait for their next start, go on."""
        for rank_id in ranks:
            rank = self._ranks.setdefault(rank_id, _SupervisedRank(due_at=now))
            if rank.phase is RankPhase.STOPPED:
                self._move(rank, RankEvent.WANTED)
                rank.due_at, rank.failures = now, 0

    def stop(self) -> list[SupervisorAction]:
        """None shall run here. The caller kills what does not end in time."""
        return [action for rank in self._ranks.values() for action in self._stop(rank)]

    def stop_unwanted(
        self, wanted: Collection[RankId], ended: Collection[RankId], now: float
    ) -> list[SupervisorAction]:
        """Ranks that are not `wanted` start no more; the processes of those in `ended` end."""
        actions: list[SupervisorAction] = []
        for rank_id, rank in self._ranks.items():
            if rank_id in wanted or (rank.running_rank is not None and rank_id not in ended):
                continue
            told = self._stop(rank)
            if told:
                rank.kill_at = now + self._stop_grace_s
            actions += told
        return actions

    def replace(self, rank_id: RankId, now: float) -> list[SupervisorAction]:
        """Its process ends, and another one follows. Once is enough."""
        rank = self._ranks[rank_id]
        if rank.phase is not RankPhase.RUNNING or rank.is_told_to_end:
            return []
        assert rank.running_rank is not None
        rank.is_told_to_end, rank.kill_at = True, now + self._stop_grace_s
        return [Terminate(running_rank=rank.running_rank)]

    def _stop(self, rank: _SupervisedRank) -> list[SupervisorAction]:
        was_running = rank.phase is RankPhase.RUNNING
        self._move(rank, RankEvent.STOP)
        if was_running and rank.running_rank is not None:
            rank.is_told_to_end = True
            return [Terminate(running_rank=rank.running_rank)]
        return []

    def _set_running(
        self, running_rank: RunningRank, event: RankEvent, now: float
    ) -> list[SupervisorAction]:
        rank = self._ranks[running_rank.member.rank]
        self._move(rank, event)
        rank.running_rank, rank.running_since = running_rank, now
        rank.last_incarnation = rank.first_incarnation = running_rank.member.incarnation
        rank.is_told_to_end = rank.phase is RankPhase.STOPPING
        if not rank.is_told_to_end:
            return []
        rank.kill_at = now + self._stop_grace_s
        return [Terminate(running_rank=running_rank)]

    def _wait(
        self, rank: _SupervisedRank, *, uptime_s: float, exit_code: int | None, now: float
    ) -> None:
        rank.failures = self._policy.failures_after(
            rank.failures, uptime_s=uptime_s, exit_code=exit_code
        )
        if rank.is_told_to_end:
            rank.failures = 0
        rank.due_at = now + self._policy.delay_s(
            rank.failures, exit_code=exit_code, jitter=self._rng.random()
        )

    @staticmethod
    def _move(rank: _SupervisedRank, event: RankEvent) -> None:
        rank.phase = TRANSITIONS[rank.phase, event]
