"""The event loop's side of the engine: puts what arrives into its inbox, and tells others what it
says of itself. Owns no decision and no thread."""

from __future__ import annotations

import os

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.mailbox import Arrival, DropOrigin, Hold, Inbox, NewMap, Stop
from gpu_worker.engine.sequence import Origin
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierDriver
from shared.clock import Clock
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member
from shared.wire import (
    Cancel,
    GraphBarrierUpdate,
    Load,
    Ping,
    Pong,
    StatusQuery,
    StatusReply,
    Submit,
    Wake,
)


class EngineClient:
    """Implements `control_server.EngineInterface`. `barrier_driver` is there where ranks count
    graphs."""

    def __init__(
        self,
        *,
        member: Member,
        engine: Engine,
        inbox: Inbox,
        clock: Clock,
        barrier_driver: GraphBarrierDriver | None,
    ) -> None:
        self._member = member
        self._engine = engine
        self._inbox = inbox
        self._clock = clock
        self._barrier_driver = barrier_driver

    def submit(self, origin: Origin, submit: Submit) -> bool:
        return self._inbox.put(Arrival(origin=origin, submit=submit))

    def cancel(self, cancel: Cancel) -> bool:
        return self._inbox.put(cancel)

    def drop_origin(self, origin: Origin) -> None:
        self._inbox.put(DropOrigin(origin=origin))

    def wake(self, wake: Wake) -> None:
        self._inbox.put(wake)

    def on_graph_update(self, update: GraphBarrierUpdate) -> None:
        if self._barrier_driver is not None:
            self._barrier_driver.on_update(update)

    def on_map_seen(self, expert_map: ExpertMap) -> None:
        """A map is there; it is handed over once its members' links are open."""
        if self._barrier_driver is not None:
            self._barrier_driver.on_map(expert_map)

    def enqueue_map(self, expert_map: ExpertMap) -> None:
        self._inbox.put(NewMap(expert_map=expert_map, seen_at=self._clock.now()))

    def hold(self, epoch: Epoch) -> None:
        if self._barrier_driver is not None:
            self._barrier_driver.notify_when_undeliverable(epoch)
        else:
            self._inbox.put(Hold(epoch=epoch))

    def declare_dead(self, dead: Member, epoch: Epoch) -> None:
        """A verdict on a peer: where messages carry no epoch, it ends the waits for it."""
        if self._barrier_driver is not None:
            self._barrier_driver.declare_dead(dead, epoch)

    def stop(self) -> None:
        self._inbox.put(Stop())

    def load(self) -> Load:
        return self._engine.snapshot().load

    def pong(self, ping: Ping) -> Pong:
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
            adoptions=now.adoptions,
            blocks_restored=now.blocks_restored,
        )
