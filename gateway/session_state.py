"""The states of a session, what takes it from one to another, and why it fails. `stream_session`
has the table."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from shared.errors import StarfishError


class SessionState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class SessionEvent(Enum):
    PLACED = "placed"
    TOKENS = "tokens"
    ENDED = "ended"
    REFUSED = "refused"
    RANK_LOST = "rank_lost"
    MOVED = "moved"
    REJECTED = "rejected"
    GIVEN_UP = "given_up"
    STOPPED = "stopped"
    CLIENT_GONE = "client_gone"


class FailureKind(Enum):
    """Why a session failed. The HTTP API maps each to a status."""

    NO_RANK = "no_rank"  # there was no live rank in time
    OVERLOADED = "overloaded"  # ranks refused it again and again: they are full
    RANKS_LOST = "ranks_lost"  # several ranks in a row were lost before a token
    REJECTED = "rejected"  # a rank answered that no rank can run the request
    INVALID = "invalid"  # a rank answered that the request itself is at fault
    SHUTDOWN = "shutdown"  # this gateway is stopping
    STALLED = "stalled"  # its rank answers, but has finished no step for too long
    DEADLINE = "deadline"  # the request's own time is over


TRANSITIONS: dict[tuple[SessionState, SessionEvent], SessionState] = {
    (SessionState.WAITING, SessionEvent.PLACED): SessionState.RUNNING,
    (SessionState.WAITING, SessionEvent.GIVEN_UP): SessionState.FAILED,
    (SessionState.WAITING, SessionEvent.STOPPED): SessionState.FINISHED,
    (SessionState.WAITING, SessionEvent.CLIENT_GONE): SessionState.CANCELLED,
    (SessionState.RUNNING, SessionEvent.TOKENS): SessionState.RUNNING,
    (SessionState.RUNNING, SessionEvent.ENDED): SessionState.FINISHED,
    (SessionState.RUNNING, SessionEvent.REFUSED): SessionState.WAITING,
    (SessionState.RUNNING, SessionEvent.RANK_LOST): SessionState.WAITING,
    (SessionState.RUNNING, SessionEvent.MOVED): SessionState.RUNNING,
    (SessionState.RUNNING, SessionEvent.REJECTED): SessionState.FAILED,
    (SessionState.RUNNING, SessionEvent.GIVEN_UP): SessionState.FAILED,
    (SessionState.RUNNING, SessionEvent.STOPPED): SessionState.FINISHED,
    (SessionState.RUNNING, SessionEvent.CLIENT_GONE): SessionState.CANCELLED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPolicy:
    """`losses_max` limits how many ranks a session may lose in a row without a token in between, so
    that a prompt that crashes its rank does not crash all of them. `guided_losses_max` is that of
    sessions with a grammar, which clients write freely: one loss may be a coincidence."""

    no_rank_timeout_s: float = 120.0
    refusals_max: int = 32
    losses_max: int = 6
    guided_losses_max: int = 1
    backoff_min_s: float = 0.02
    backoff_max_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    kind: FailureKind
    message: str


class SessionFailed(StarfishError):
    """A session of this request failed. Before the answer's first byte it becomes an HTTP
    status."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure
