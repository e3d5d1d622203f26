"""What a rank's event loop and its engine thread say to each other: the inbox, on which the engine
also sleeps, and the events that it posts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gpu_worker.engine.sequence import Origin
from shared.expert_map import ExpertMap
from shared.types import Epoch, RankId, Step, SuspicionReason
from shared.wire import Adoption, Cancel, Load, SessionTokens, Submit, Wake


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A Submit, and the connection that it came from."""

    origin: Origin
    submit: Submit


@dataclass(frozen=True, slots=True, kw_only=True)
class DropOrigin:
    """This connection is gone, and its sessions with it."""

    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanOrigin:
    """This connection is gone. Its sessions may be taken over by another, until a DropOrigin."""

    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMap:
    """A map that may be adopted: every member's link is open. `seen_at` is the `Clock.now()` at
    which it was put here. Until `waits_until` further steps under the map before it are begun, so
    that all can adopt it after the same one; 0: it does not wait, and the running step is
    abandoned."""

    expert_map: ExpertMap
    seen_at: float
    waits_until: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Run no step under the map of this epoch or an older one: slots that it names are about to be
    overwritten. The running step is abandoned. The engine answers with `Held`."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Leave the loop. The running step is abandoned."""


_AFTER_ALL_EPOCHS = Epoch(1 << 62)
_NO_WAKE = (Epoch(-1), Step(-1))

InboxItem = Arrival | Cancel | OrphanOrigin | DropOrigin | NewMap | Wake | Hold | Stop


class Waiter(Protocol):
    """What the engine blocks on, apart from its exchange: a thread's event, or the simulator's fake
    clock. A `notify` before a `wait` ends that wait."""

    def wait(self, timeout_s: float) -> None: ...

    def notify(self) -> None: ...


class ThreadWaiter:
    """For an engine that has a thread of its own."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def wait(self, timeout_s: float) -> None:
        self._event.wait(timeout_s)
        # Cleared before the caller reads its inbox, so that a later item sets it again.
        self._event.clear()

    def notify(self) -> None:
        self._event.set()


class Inbox:
    """A queue from the event loop to the engine, first in, first out. Any thread may `put`; the
    engine calls the rest.

    Arrivals are refused beyond a number or a sum of tokens, and cancellations beyond
    CANCELS_PER_ARRIVAL times that number. Of Wakes only those later than all that wait are kept:
    the others say nothing more. The other items are never refused: their number is bounded by the
    number of connections that have sent Arrivals, or the engine must not miss them.
    """

    CANCELS_PER_ARRIVAL = 8

    def __init__(
        self, waiter: Waiter, *, arrivals_max: int = 256, arrival_tokens_max: int = 4_000_000
    ) -> None:
        self.newest_epoch = Epoch(0)
        """The epoch of the newest NewMap that does not wait, or the one after a Hold; later than
        any after a Stop. Read without the lock, also while the engine waits for peers."""
        self.waiting: NewMap | None = None
        """The newest one that waits. Read without the lock."""
        self.may_run_ahead = True
        """Read without the lock. False while the link to a member of the map is broken: if it has
        died, every step in flight is thrown away and must first end, so one more is time lost."""
        self.tenants: frozenset[str] = frozenset()
        """Read without the lock: tenants that have sessions in flight, here or on other ranks."""
        self._waiter = waiter
        self._arrivals_max = arrivals_max
        self._arrival_tokens_max = arrival_tokens_max
        self._lock = threading.Lock()
        self._items: list[InboxItem] = []
        self._num_arrivals = 0
        self._num_arrival_tokens = 0
        self._num_cancels = 0
        self._last_wake = _NO_WAKE

    def put(self, item: InboxItem) -> bool:
        """False: full, and the item is not taken. For an Arrival the caller answers "retryable".
        For a Cancel it closes the connection, and the DropOrigin that follows ends the session."""
        with self._lock:
            if not self._has_space(item):
                return False
            if isinstance(item, Wake):
                if (item.epoch, item.step) <= self._last_wake:
                    return True
                self._last_wake = (item.epoch, item.step)
            self._items.append(item)
            if isinstance(item, NewMap) and item.waits_until:
                self.waiting = item
            elif isinstance(item, NewMap):
                self.newest_epoch = max(self.newest_epoch, item.expert_map.epoch)
            elif isinstance(item, Hold):
                self.newest_epoch = max(self.newest_epoch, Epoch(item.epoch + 1))
            elif isinstance(item, Stop):
                self.newest_epoch = _AFTER_ALL_EPOCHS
        self._waiter.notify()
        return True

    def drain(self) -> list[InboxItem]:
        if not self._items:  # saves the lock at most steps; the next drain sees a racing put
            return []
        with self._lock:
            items, self._items = self._items, []
            self._num_arrivals = self._num_arrival_tokens = self._num_cancels = 0
            self._last_wake = _NO_WAKE
        return items

    def wait(self, timeout_s: float) -> None:
        """Blocks until something was put since the last `wait`, or for the timeout."""
        self._waiter.wait(timeout_s)

    def end_patience(self) -> None:
        """A NewMap that waits does so no longer. It is in force at once."""
        with self._lock:
            if self.waiting is not None:
                self.newest_epoch = max(self.newest_epoch, self.waiting.expert_map.epoch)
                self.waiting = None
        self._waiter.notify()

    def notify(self) -> None:
        """Ends a `wait`: something outside of the inbox has changed."""
        self._waiter.notify()

    def _has_space(self, item: InboxItem) -> bool:
        if isinstance(item, Arrival):
            num_tokens = self._num_arrival_tokens + len(item.submit.tokens)
            if self._num_arrivals >= self._arrivals_max or (
                self._num_arrivals and num_tokens > self._arrival_tokens_max
            ):
                return False
            self._num_arrivals += 1
            self._num_arrival_tokens = num_tokens
        elif isinstance(item, Cancel):
            if self._num_cancels >= self._arrivals_max * self.CANCELS_PER_ARRIVAL:
                return False
            self._num_cancels += 1
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """The replies to each connection: the tokens of a committed step, or the results of inbox items
    handled before the step."""

    epoch: Epoch
    step: Step
    sessions: Mapping[Origin, tuple[SessionTokens, ...]]
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """The exchange waits for this rank past the deadline, or its link failed."""

    rank: RankId
    reason: SuspicionReason
    epoch: Epoch
    step: Step
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SendWake:
    """Every other member must know that this step has work."""

    epoch: Epoch
    step: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """The engine runs under this map from now on."""

    expert_map: ExpertMap
    adoption: Adoption


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The engine runs no step until it adopts a map newer than this epoch."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Fenced:
    """The map of this epoch leaves this rank out; the engine has stopped."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranded:
    """A step of this epoch was abandoned STRANDED_S ago, and no newer map has come: the peers may
    have gone on without this rank. The engine has stopped."""

    epoch: Epoch


EngineEvent = StepTokens | Suspect | SendWake | Adopted | Held | Fenced | Stranded

Post = Callable[[EngineEvent], None]
"""Called on the engine thread; must neither block nor raise."""
