"""Carries a `GraphBarrier` between the two threads of a rank: the event loop, which hears of maps,
verdicts and peers, and the engine thread, which launches graphs. Decides nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace

import structlog

from gpu_worker.exchange.graph_barrier import GraphBarrier
from gpu_worker.exchange.worker_thread import Worker
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member, Step
from shared.wire import GraphBarrierUpdate

log = structlog.get_logger()

Release = Callable[[Collection[Member], Epoch], None]
"""Kernels shall no longer wait for these members. The map of this epoch is without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphBarrierCallbacks:
    """All are called on the event loop, except `notify_engine`: any thread may call it."""

    send_update: Callable[[GraphBarrierUpdate, Iterable[Member]], None]
    wake: Callable[[Step], None]  # of all other members
    notify_engine: Callable[[], None]  # the engine looks again whether it may go on
    on_undeliverable: Callable[[Epoch], None]  # nobody can deliver a step of this map any more
    on_failed: Callable[[str], None]  # this incarnation cannot go on, and why


class GraphBarrierDriver:
    def __init__(
        self,
        member: Member,
        release: Release,
        loop: asyncio.AbstractEventLoop,
        release_worker: Worker,
        callbacks: GraphBarrierCallbacks,
        *,
        meets_peers: bool = True,
    ) -> None:
        """`release` is called on `release_worker`: a card in trouble may not answer. Without
        `meets_peers`, graphs wait for nobody, as those of a dense model: this rank agrees with
        itself alone, and tells its peers nothing."""
        self._barrier = GraphBarrier(member)
        self._meets_peers = meets_peers
        self._release = release
        self._loop = loop
        self._release_worker = release_worker
        self._lock = threading.Lock()
        self._callbacks = callbacks
        self._newest: ExpertMap | None = None
        self._peers: frozenset[Member] = frozenset()
        self._awaited_epoch: Epoch | None = None

    # On the event loop ---------------------------------------------------------------------------

    def on_map(self, expert_map: ExpertMap) -> None:
        """As soon as a map is seen, whether or not it can be adopted yet. Maps without this rank
        and old maps are ignored."""
        newest = self._newest
        own = self._barrier.own.member
        if not expert_map.has(own) or (newest and expert_map.epoch <= newest.epoch):
            return
        self._newest = expert_map
        met = self._met_in(expert_map)
        with self._lock:
            effects = self._barrier.on_map(met)
        self._peers = frozenset(met.members) - {own}
        self._send_own_update()
        if effects.to_release:
            self._release_members(
                effects.to_release,
                expert_map.epoch,
                lambda: self._barrier.on_released(effects.to_release, expert_map.epoch),
            )

    def declare_dead(self, dead: Member, epoch: Epoch) -> None:
        """There is a verdict. The map of `epoch`, which may not exist yet, is without this
        member."""
        if not self._meets_peers:
            return
        self._release_members([dead], epoch, lambda: self._barrier.declare_dead(dead, epoch))

    def _release_members(
        self, members: Collection[Member], epoch: Epoch, then: Callable[[], None]
    ) -> None:
        """On its own thread, because a card in trouble may not answer. Peers are told only when it
        is done."""

        def work() -> None:
            self._release(members, epoch)
            with self._lock:
                then()
            self._loop.call_soon_threadsafe(self._send_own_update)

        self._release_worker.submit(work).add_done_callback(self._on_release_done)

    def _on_release_done(self, done: Future[None]) -> None:
        if (error := done.exception()) is not None:
            self._loop.call_soon_threadsafe(self._callbacks.on_failed, f"the card fails: {error}")

    def on_update(self, update: GraphBarrierUpdate) -> None:
        with self._lock:
            self._barrier.on_update(update)
        self._check_progress()

    def handshake(self, peer: Member) -> None:
        """A link to this peer has been opened. Earlier updates may not have reached it."""
        self._callbacks.send_update(self._barrier.own, [peer])

    def notify_when_undeliverable(self, epoch: Epoch) -> None:
        """Answered by `on_undeliverable` once no living member can deliver a step of this map."""
        self._awaited_epoch = max(self._awaited_epoch or epoch, epoch)
        self._check_progress()

    # On the engine thread ------------------------------------------------------------------------

    def claim_launch_before(self, expert_map: ExpertMap) -> bool:
        """Whether one more empty graph is to be launched before this map is adopted."""
        expert_map = self._met_in(expert_map)
        with self._lock:
            at = self._barrier.join_at(expert_map)
            is_joiner = self._barrier.own.member.rank in expert_map.joiners
            if at is None or is_joiner or self._barrier.num_launched >= at:
                return False
            self._barrier.launch()
            return True

    def prepare_adoption(self, expert_map: ExpertMap) -> bool:
        """Whether the map may be adopted now. Call it if `claim_launch_before` has nothing more to
        launch; the others are told that this rank has paused."""
        expert_map = self._met_in(expert_map)
        with self._lock:
            if self._barrier.join_at(expert_map) is None:
                return False
            before = self._barrier.own
            self._barrier.pause(expert_map)
            changed = self._barrier.own is not before
            may_adopt = self._barrier.may_adopt(expert_map)
        if changed:
            self._loop.call_soon_threadsafe(self._send_own_update)
        return may_adopt

    def adopt(self, expert_map: ExpertMap, take: Callable[[], None]) -> Step:
        """Returns the number of the first graph under this map. `take` makes kernels wait for its
        members, before any peer hears of it; it may block. Raises StepAbandoned if the members do
        not meet in this map."""
        with self._lock:
            self._barrier.adopt(self._met_in(expert_map))
        take()
        with self._lock:
            self._barrier.enter()
            first = Step(self._barrier.num_launched)
        self._loop.call_soon_threadsafe(self._send_own_update)
        return first

    def claim(self, *, ahead: bool = False) -> bool:
        """Counts the next graph as launched, if it may be launched. `ahead`: while the last one is
        in flight."""
        barrier = self._barrier
        with self._lock:
            if not (barrier.may_launch_ahead() if ahead else barrier.may_launch()):
                return False
            before = barrier.own
            barrier.launch()
            missed_sleep, launched = barrier.note_missed_sleep(), barrier.num_launched
            changed = barrier.own is not before
        if missed_sleep:
            self._loop.call_soon_threadsafe(self._wake_others, launched)
        elif changed:
            self._loop.call_soon_threadsafe(self._send_own_update)
        return True

    def claim_flush(self, *, stopped: bool) -> bool:
        """Whether one more empty graph is to be launched for a peer that waits in one. `stopped`:
        this rank runs no more steps under the adopted map."""
        with self._lock:
            if not self._barrier.may_flush(stopped=stopped):
                return False
            before = self._barrier.own
            self._barrier.launch()
            changed = self._barrier.own is not before
        if changed:
            self._loop.call_soon_threadsafe(self._send_own_update)
        return True

    def peers_met(self, expert_map: ExpertMap) -> tuple[Member, ...]:
        """Whom graphs under this map wait for."""
        own = self._barrier.own.member
        return tuple(m for m in self._met_in(expert_map).members if m != own)

    @property
    def out_of_step(self) -> Epoch:
        """Any thread. See `GraphBarrier.out_of_step`."""
        with self._lock:
            return self._barrier.out_of_step

    def awaited(self) -> list[Member]:
        """The members that this rank waits for, if it may neither adopt nor launch."""
        with self._lock:
            return self._barrier.awaited()

    def on_graph_done(self, lost: Collection[Member] = ()) -> None:
        """The first of the graphs in flight has ended, whatever its result. `lost`: members that it
        lacks, without those that kernels no longer wait for."""
        with self._lock:
            before = self._barrier.own
            self._barrier.on_graph_done(lost)
            changed = self._barrier.own is not before
        if changed:
            self._loop.call_soon_threadsafe(self._send_own_update)

    def commit(self, *, had_work: bool) -> bool:
        """The graph that ended last was committed. Returns whether all sleep now."""
        with self._lock:
            before = self._barrier.own
            self._barrier.note_step(had_work=had_work)
            asleep = self._barrier.sleep_if_agreed()
            missed_sleep = not asleep and self._barrier.note_missed_sleep()
            launched = self._barrier.num_launched
            changed = self._barrier.own is not before
        if missed_sleep:
            self._loop.call_soon_threadsafe(self._wake_others, launched)
        elif changed:
            self._loop.call_soon_threadsafe(self._send_own_update)
        return asleep

    # ---------------------------------------------------------------------------------------------

    def _met_in(self, expert_map: ExpertMap) -> ExpertMap:
        """The map as the barrier sees it."""
        if self._meets_peers:
            return expert_map
        return replace(expert_map, members=(self._barrier.own.member,), joiners=())

    def _wake_others(self, launched: int) -> None:
        self._callbacks.wake(Step(launched))
        self._send_own_update()

    def _send_own_update(self) -> None:
        self._callbacks.send_update(self._barrier.own, self._peers)
        self._check_progress()

    def _check_progress(self) -> None:
        with self._lock:
            missed_sleep = self._barrier.note_missed_sleep()
            launched = self._barrier.num_launched
            clear = self._awaited_epoch is not None and self._barrier.is_clear_of(
                self._awaited_epoch
            )
        if missed_sleep:
            self._wake_others(launched)
        if clear and self._awaited_epoch is not None:
            held, self._awaited_epoch = self._awaited_epoch, None
            self._callbacks.on_undeliverable(held)
        self._callbacks.notify_engine()
