"""The event loop's side of the engine, and the only one: what others ask goes into the engine's
inbox or to its graph barrier, and what the engine reports comes out as calls. Decides nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from gpu_worker.engine.adoption_patience import AdoptionPatience
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.grammar_matcher import Grammars
from gpu_worker.engine.kv_replication import KvReplicator
from gpu_worker.engine.mailbox import (
    Adopted,
    Arrival,
    DropOrigin,
    EngineEvent,
    Fenced,
    Held,
    Hold,
    Inbox,
    NewMap,
    OrphanOrigin,
    SendWake,
    StepTokens,
    Stop,
    Stranded,
    Suspect,
    Waiter,
)
from gpu_worker.engine.monitor import EngineMonitor
from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.sequence import Origin
from gpu_worker.engine.step_runner import MakeRunner
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks
from shared.clock import Clock
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member, RankId, Step
from shared.wire import (
    Adoption,
    AnnouncedOperation,
    Cancel,
    GraphBarrierUpdate,
    Load,
    Ping,
    Pong,
    StatusQuery,
    StatusReply,
    Submit,
    UnheardPeer,
    Wake,
)

log = structlog.get_logger()

WAKE_STEPS_AHEAD_MAX = 64
"""Ranks step together, so that a peer is a step or two ahead at most."""


class EngineExecutor(Protocol):
    """What the engine runs on: a thread, or a greenlet of the simulator."""

    @property
    def waiter(self) -> Waiter: ...

    def cpu_s(self) -> float:
        """CPU seconds that the engine has used; a constant if nobody counts them."""
        ...

    def start(self, run: Callable[[], None]) -> asyncio.Future[None]:
        """Runs it. The future ends when `run` returns, or with the exception that it raised."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCallbacks:
    """What the engine and its graph barrier report. All are called on the event loop."""

    send_tokens: Callable[[StepTokens], None]
    send_wake: Callable[[Epoch, Step], None]  # to all other members
    send_update: Callable[[GraphBarrierUpdate, Iterable[Member]], None]
    suspect: Callable[[Suspect], None]
    adopted: Callable[[ExpertMap, Adoption], None]
    held: Callable[[Epoch], None]
    stopped: Callable[[str], None]  # the engine cannot go on in this incarnation, and why


class EngineClient:
    """Owns the engine and its graph barrier. All methods run on the event loop."""

    def __init__(
        self,
        *,
        member: Member,
        executor: EngineExecutor,
        make_runner: MakeRunner,
        scheduler: Scheduler,
        replicator: KvReplicator,
        clock: Clock,
        callbacks: EngineCallbacks,
        grammars: Grammars | None = None,
    ) -> None:
        """`replicator` and `grammars` are the scheduler's."""
        self._member = member
        self._executor = executor
        self._clock = clock
        self._callbacks = callbacks
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox(executor.waiter)
        if grammars is not None:
            grammars.renew(self._inbox.notify)
        self._stopped = False
        self._submitters: set[Origin] = set()  # connections that have sent sessions
        self._tenants: dict[Origin, frozenset[str]] = {}  # that have sessions in flight
        self._members: tuple[Member, ...] = ()  # of the newest map that was handed over
        self._patience = AdoptionPatience(member)
        self._broken_links: set[Member] = set()
        self._known_epoch = Epoch(0)  # of the newest map or verdict that etcd has shown
        self._early_updates: dict[Member, GraphBarrierUpdate] = {}  # the last one of each peer
        monitor = EngineMonitor(self._inbox, self._post, clock, executor.cpu_s)
        barrier_callbacks = GraphBarrierCallbacks(
            send_update=lambda update, peers: (
                None if self._stopped else callbacks.send_update(update, peers)
            ),
            wake=lambda step: None if self._stopped else callbacks.send_wake(Epoch(0), step),
            notify_engine=self._inbox.notify,
            on_undeliverable=lambda epoch: None if self._stopped else callbacks.held(epoch),
            on_failed=lambda reason: None if self._stopped else callbacks.stopped(reason),
        )
        runner, self._barrier_driver = make_runner(monitor, barrier_callbacks)
        self._engine = Engine(
            member=member,
            runner=runner,
            scheduler=scheduler,
            inbox=self._inbox,
            monitor=monitor,
            post=self._post,
            clock=clock,
            replicator=replicator,
        )

    @property
    def counts_graphs(self) -> bool:
        """Whether ranks meet by counting graphs. Their messages carry no epoch then."""
        return self._barrier_driver is not None

    def start(self) -> asyncio.Future[None]:
        """Ends when the engine stops, or with the exception that it raised."""
        return self._executor.start(self._engine.run)

    def stop(self) -> None:
        """Ends the engine, and its step. Nothing that it or its graph barrier reports is passed on
        from now on: a release may end after the incarnation."""
        self._stopped = True
        self._inbox.put(Stop())

    # What others ask -----------------------------------------------------------------------------

    def submit(self, origin: Origin, submit: Submit) -> bool:
        """False if the engine's inbox is full."""
        if not self._inbox.put(Arrival(origin=origin, submit=submit)):
            return False
        self._submitters.add(origin)
        return True

    def cancel(self, cancel: Cancel) -> bool:
        """False if the engine's inbox is full."""
        return self._inbox.put(cancel)

    @property
    def tenants(self) -> frozenset[str]:
        """That have sessions in flight, on whatever rank."""
        return self._inbox.tenants

    def on_tenants(self, origin: Origin, tenants: Iterable[str]) -> None:
        """This connection's gateway has sessions of these in flight; of no others, or of more than
        it names."""
        self._tenants[origin] = frozenset(tenants)
        self._inbox.tenants = frozenset().union(*self._tenants.values())

    def orphan_origin(self, origin: Origin, orphan_s: float) -> None:
        """This connection is gone. What another gateway may take over goes on for `orphan_s`
        seconds, the rest ends. The engine does not hear of a connection that had no sessions: it
        may read nothing for a while, and peers that come and go meanwhile must not fill its
        inbox."""
        self._forget_tenants(origin)
        if origin not in self._submitters:
            return
        self._submitters.remove(origin)
        if orphan_s <= 0:
            self._drop_origin(origin)
            return
        self._inbox.put(OrphanOrigin(origin=origin))
        self._loop.call_later(orphan_s, self._drop_origin, origin)

    def _drop_origin(self, origin: Origin) -> None:
        self._inbox.put(DropOrigin(origin=origin))

    def _forget_tenants(self, origin: Origin) -> None:
        if self._tenants.pop(origin, None):
            self._inbox.tenants = frozenset().union(*self._tenants.values())

    def wake(self, wake: Wake) -> None:
        here = self._engine.snapshot()
        believed = believable_wake(wake, self._known_epoch, here.epoch, here.step)
        if believed is None:
            log.warning("wake_ignored", peer=wake.rank, epoch=wake.epoch, step=wake.step)
        else:
            self._inbox.put(believed)

    def on_graph_update(self, update: GraphBarrierUpdate) -> None:
        """One that names a map unknown here is kept until etcd has shown a map as new as that."""
        if self._barrier_driver is None:
            return
        if _newest_epoch_of(update) > self._known_epoch:
            self._early_updates[update.member] = update
            return
        self._early_updates.pop(update.member, None)
        self._barrier_driver.on_update(update)

    def _on_epoch_known(self, epoch: Epoch) -> None:
        self._known_epoch = max(self._known_epoch, epoch)
        for update in list(self._early_updates.values()):
            self.on_graph_update(update)

    def on_link_opened(self, peer: Member) -> None:
        self._broken_links.discard(peer)
        self._update_may_run_ahead()
        if self._barrier_driver is not None:
            self._barrier_driver.handshake(peer)

    def on_link_broken(self, peer: Member) -> None:
        """Perhaps the peer has died; a verdict decides. Until then no step is begun ahead."""
        self._broken_links.add(peer)
        self._update_may_run_ahead()
        self.on_link_closed(peer)

    def on_link_closed(self, peer: Member) -> None:
        """If steps still run with the peer, none may be completed any more: nobody waits for it."""
        if self._patience.steps_with(peer):
            self._inbox.end_patience()

    def _update_may_run_ahead(self) -> None:
        self._inbox.may_run_ahead = self._broken_links.isdisjoint(self._members)

    def announce_map(self, expert_map: ExpertMap) -> None:
        """This map is published. `adopt_map` follows once its members' links are open."""
        if self._barrier_driver is not None:
            self._barrier_driver.on_map(expert_map)
        self._on_epoch_known(expert_map.epoch)

    def adopt_map(self, expert_map: ExpertMap) -> None:
        now, until = self._clock.now(), 0.0
        if not self.counts_graphs:
            until = self._patience.until(expert_map, self._broken_links, now)
        self._members = expert_map.members
        self._broken_links.intersection_update(self._members)
        self._update_may_run_ahead()
        self._on_epoch_known(expert_map.epoch)
        self._inbox.put(NewMap(expert_map=expert_map, seen_at=now, waits_until=until))

    def hold(self, epoch: Epoch) -> None:
        """Answered by the callback `held`."""
        if self._barrier_driver is not None:
            self._barrier_driver.notify_when_undeliverable(epoch)
        else:
            self._inbox.put(Hold(epoch=epoch))

    def declare_dead(self, dead: Member, epoch: Epoch) -> None:
        """A verdict on a peer. If messages carry no epoch, it ends the waits for this peer."""
        if self._barrier_driver is not None:
            self._barrier_driver.declare_dead(dead, epoch)
        self._on_epoch_known(epoch)

    def load(self) -> Load:
        return self._engine.snapshot().load

    def waits(self) -> tuple[tuple[Epoch, Step], frozenset[RankId]]:
        """The present step, and the ranks that it waits for."""
        now = self._engine.snapshot()
        return (now.epoch, now.step), frozenset(now.waiting_for)

    def pong(
        self,
        ping: Ping,
        announced: tuple[AnnouncedOperation, ...],
        unheard: tuple[UnheardPeer, ...],
        left_out: tuple[Member, ...],
    ) -> Pong:
        now = self._engine.snapshot()
        return Pong(
            nonce=ping.nonce,
            rank=self._member.rank,
            incarnation=self._member.incarnation,
            epoch=now.epoch,
            step=now.step,
            engine_age_ms=now.engine_age_ms,
            waiting_for=now.waiting_for,
            load=now.load,
            out_of_step=now.out_of_step,
            announced=announced,
            unheard=unheard,
            left_out=left_out,
        )

    def status(self, query: StatusQuery) -> StatusReply:
        now = self._engine.snapshot()
        return StatusReply(
            nonce=query.nonce,
            rank=self._member.rank,
            incarnation=self._member.incarnation,
            pid=os.getpid(),
            epoch=now.epoch,
            step=now.step,
            load=now.load,
            engine_age_ms=now.engine_age_ms,
            steps_committed=now.steps_committed,
            steps_abandoned=now.steps_abandoned,
            tokens_generated=now.tokens_generated,
            tokens_drafted=now.tokens_drafted,
            drafts_accepted=now.drafts_accepted,
            adoptions=now.adoptions,
            blocks_restored=now.blocks_restored,
        )

    # What the engine reports ---------------------------------------------------------------------

    def _post(self, event: EngineEvent) -> None:
        """On the engine thread."""
        self._loop.call_soon_threadsafe(self._dispatch_event, event)

    def _dispatch_event(self, event: EngineEvent) -> None:
        if self._stopped:
            return
        callbacks = self._callbacks
        match event:
            case StepTokens():
                callbacks.send_tokens(event)
            case Suspect():
                callbacks.suspect(event)
            case SendWake(epoch=epoch, step=step):
                callbacks.send_wake(epoch, step)
            case Adopted(expert_map=expert_map, adoption=adoption):
                self._patience.on_adopted(expert_map)
                log.info("map_adopted", epoch=expert_map.epoch, abandoned=adoption.abandoned)
                callbacks.adopted(expert_map, adoption)
            case Held(epoch=epoch):
                callbacks.held(epoch)
            case Stranded(epoch=epoch):
                callbacks.stopped(
                    f"no map has followed that of epoch {epoch}, though a step was invalidated"
                )
            case Fenced(epoch=epoch):
                callbacks.stopped(f"the map of epoch {epoch} leaves this rank out")


def believable_wake(wake: Wake, known: Epoch, epoch: Epoch, step: Step) -> Wake | None:
    """What a rank at this step of this epoch, which knows maps up to `known`, believes of a Wake.
    None if it names a later map: nothing is lost, because a rank that adopts a map runs its first
    step unasked. A step that is too far ahead counts as the farthest that may be, so that a forged
    one wakes the rank for a few steps at most."""
    if wake.epoch > known:
        return None
    here = step if wake.epoch in (Epoch(0), epoch) else 0  # 0: steps are counted across epochs
    return replace(wake, step=Step(min(wake.step, here + WAKE_STEPS_AHEAD_MAX)))


def _newest_epoch_of(update: GraphBarrierUpdate) -> Epoch:
    return max(update.joining, update.paused, update.entered, update.invalidated)
