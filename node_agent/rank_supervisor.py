"""Where each rank of this node stands between two lives, and what to do next. Pure: events and
`now` in, actions out; processes and etcd are the driver's.

A rank waits until it is due, is started (incarnation, lease, process: three steps of the driver,
any of which may fail), runs until its process exits, is buried (lease revoked), and waits again for
as long as the respawn policy says. A process that is seen to die is buried at once, though the
kernel may take long to take it apart; the next life waits for its end all the same, for until then
it holds its ports and its card's memory. Stopping is one way: nothing leaves STOPPED. A life that
the control plane declared dead exits by itself as soon as it learns of it; one that cannot (it
hangs, or is stopped) is killed when its grace is over, so that its rank can live again.

    phase     event         next      action
    waiting   due           starting  Spawn
    waiting   adopted       running   –
    waiting   stop          stopped   –
    starting  spawned       running   –
    starting  spawn_failed  waiting   –
    starting  stop          stopping  –
    running   dying         dying     Bury
    running   exited        waiting   Bury
    running   condemned     running   Kill, after the grace
    running   stop          stopping  Terminate
    dying     exited        waiting   –
    dying     stop          ending    –
    stopping  spawned       stopping  Terminate
    stopping  spawn_failed  stopped   –
    stopping  dying         ending    Bury
    stopping  exited        stopped   Bury
    stopping  stop          stopping  –
    ending    exited        stopped   –
    ending    stop          ending    –
    stopped   stop          stopped   –
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from node_agent.restart_policy import RespawnPolicy
from shared.types import Member, RankId


class Phase(Enum):
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    DYING = "dying"
    STOPPING = "stopping"
    ENDING = "ending"
    STOPPED = "stopped"


class Event(Enum):
    DUE = "due"
    ADOPTED = "adopted"
    SPAWNED = "spawned"
    SPAWN_FAILED = "spawn_failed"
    DYING = "dying"
    EXITED = "exited"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """A running process of a rank, and the lease that stands for it."""

    member: Member
    lease_id: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    rank: RankId


@dataclass(frozen=True, slots=True, kw_only=True)
class Bury:
    """The process is gone, or can only go: revoke its lease now."""

    life: Life
    exit_code: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminate:
    life: Life


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """The life has a verdict and did not leave."""

    life: Life


Action = Spawn | Bury | Terminate | Kill

TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    (Phase.WAITING, Event.DUE): Phase.STARTING,
    (Phase.WAITING, Event.ADOPTED): Phase.RUNNING,
    (Phase.WAITING, Event.STOP): Phase.STOPPED,
    (Phase.STARTING, Event.SPAWNED): Phase.RUNNING,
    (Phase.STARTING, Event.SPAWN_FAILED): Phase.WAITING,
    (Phase.STARTING, Event.STOP): Phase.STOPPING,
    (Phase.RUNNING, Event.DYING): Phase.DYING,
    (Phase.RUNNING, Event.EXITED): Phase.WAITING,
    (Phase.RUNNING, Event.STOP): Phase.STOPPING,
    (Phase.DYING, Event.EXITED): Phase.WAITING,
    (Phase.DYING, Event.STOP): Phase.ENDING,
    (Phase.STOPPING, Event.SPAWNED): Phase.STOPPING,
    (Phase.STOPPING, Event.SPAWN_FAILED): Phase.STOPPED,
    (Phase.STOPPING, Event.DYING): Phase.ENDING,
    (Phase.STOPPING, Event.EXITED): Phase.STOPPED,
    (Phase.STOPPING, Event.STOP): Phase.STOPPING,
    (Phase.ENDING, Event.EXITED): Phase.STOPPED,
    (Phase.ENDING, Event.STOP): Phase.ENDING,
    (Phase.STOPPED, Event.STOP): Phase.STOPPED,
}

_BURIED = frozenset({Phase.DYING, Phase.ENDING})


@dataclass(slots=True)
class _Rank:
    due_at: float
    phase: Phase = Phase.WAITING
    life: Life | None = None
    running_since: float = 0.0
    kill_at: float | None = None
    failures: int = 0


class RankLives:
    """All ranks of one node. An event that the table does not have is a bug of the driver."""

    def __init__(
        self,
        ranks: Iterable[RankId],
        policy: RespawnPolicy,
        rng: random.Random,
        now: float,
        *,
        condemned_grace_s: float = 10.0,
    ) -> None:
        self._policy = policy
        self._condemned_grace_s = condemned_grace_s
        self._rng = rng
        self._ranks = {rank: _Rank(due_at=now) for rank in ranks}

    @property
    def all_stopped(self) -> bool:
        return all(rank.phase is Phase.STOPPED for rank in self._ranks.values())

    def owns(self, rank: RankId) -> bool:
        return rank in self._ranks

    def phase_of(self, rank: RankId) -> Phase:
        return self._ranks[rank].phase

    def running(self) -> list[Life]:
        return [rank.life for rank in self._ranks.values() if rank.life is not None]

    def living(self) -> list[Life]:
        """Those that have not been seen to die."""
        ranks = self._ranks.values()
        return [r.life for r in ranks if r.life is not None and r.phase not in _BURIED]

    def next_due_at(self) -> float | None:
        """When `due` will have something to do; None where nothing waits for its time."""
        waiting = (r.due_at for r in self._ranks.values() if r.phase is Phase.WAITING)
        condemned = (r.kill_at for r in self._ranks.values() if r.kill_at is not None)
        return min((*waiting, *condemned), default=None)

    def due(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for rank_id, rank in self._ranks.items():
            if rank.phase is Phase.WAITING and rank.due_at <= now:
                self._move(rank, Event.DUE)
                actions.append(Spawn(rank=rank_id))
            elif rank.kill_at is not None and rank.kill_at <= now:
                rank.kill_at = None
                assert rank.life is not None
                actions.append(Kill(life=rank.life))
        return actions

    def condemned(self, member: Member, now: float) -> list[Action]:
        """The control plane has declared this life dead. It may say so more than once; the grace
        does not begin anew."""
        condemned = (life for life in self.living() if life.member == member)
        for life in condemned:
            rank = self._ranks[life.member.rank]
            if rank.kill_at is None:
                rank.kill_at = now + self._condemned_grace_s
        return []

    def adopted(self, life: Life, now: float) -> list[Action]:
        """A process of an earlier agent that still runs."""
        return self._lives(life, Event.ADOPTED, now)

    def spawned(self, life: Life, now: float) -> list[Action]:
        return self._lives(life, Event.SPAWNED, now)

    def spawn_failed(self, rank_id: RankId, now: float) -> list[Action]:
        rank = self._ranks[rank_id]
        self._move(rank, Event.SPAWN_FAILED)
        self._wait(rank, lived_s=0.0, exit_code=None, now=now)
        return []

    def dying(self, rank_id: RankId, exit_code: int | None) -> list[Action]:
        """Its process can only end; `exited` follows."""
        rank = self._ranks[rank_id]
        self._move(rank, Event.DYING)
        assert rank.life is not None
        rank.kill_at = None
        return [Bury(life=rank.life, exit_code=exit_code)]

    def exited(self, rank_id: RankId, exit_code: int | None, now: float) -> list[Action]:
        """`exit_code` is None for an adopted process, whose parent was another."""
        rank = self._ranks[rank_id]
        was_buried = rank.phase in _BURIED
        self._move(rank, Event.EXITED)
        assert rank.life is not None
        life, rank.life, rank.kill_at = rank.life, None, None
        self._wait(rank, lived_s=now - rank.running_since, exit_code=exit_code, now=now)
        return [] if was_buried else [Bury(life=life, exit_code=exit_code)]

    def stop(self) -> list[Action]:
        actions: list[Action] = []
        for rank in self._ranks.values():
            was_running = rank.phase is Phase.RUNNING
            self._move(rank, Event.STOP)
            if was_running and rank.life is not None:
                actions.append(Terminate(life=rank.life))
        return actions

    def _lives(self, life: Life, event: Event, now: float) -> list[Action]:
        rank = self._ranks[life.member.rank]
        self._move(rank, event)
        rank.life, rank.running_since = life, now
        return [Terminate(life=life)] if rank.phase is Phase.STOPPING else []

    def _wait(self, rank: _Rank, *, lived_s: float, exit_code: int | None, now: float) -> None:
        rank.failures = self._policy.failures_after(
            rank.failures, lived_s=lived_s, exit_code=exit_code
        )
        rank.due_at = now + self._policy.delay_s(
            rank.failures, exit_code=exit_code, jitter=self._rng.random()
        )

    @staticmethod
    def _move(rank: _Rank, event: Event) -> None:
        rank.phase = TRANSITIONS[rank.phase, event]
