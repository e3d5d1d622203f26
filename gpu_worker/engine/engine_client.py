"""The event loop's side of the engine: puts what arrives into its inbox, and tells others what it
says of itself. Owns no decision and no thread."""

from __future__ import annotations

import os

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.mailbox import Arrival, DropOrigin, Hold, Inbox, NewMap, Stop
from gpu_worker.engine.sequence import Origin
from gpu_worker.exchange.graph_barrier_driver import GraphConductor
from shared.clock import Clock
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member
from shared.wire import Cancel, GraphNews, Load, Ping, Pong, StatusQuery, StatusReply, Submit, Wake


class EngineGate:
    """Implements `control_server.EnginePort`. `conductor` is there where ranks count graphs."""

    def __init__(
        self,
        *,
        member: Member,
        engine: Engine,
        inbox: Inbox,
        clock: Clock,
        conductor: GraphConductor | None,
    ) -> None:
        self._member = member
        self._engine = engine
        self._inbox = inbox
        self._clock = clock
        self._conductor = conductor

    def submit(self, origin: Origin, submit: Submit) -> bool:
        return self._inbox.put(Arrival(origin=origin, submit=submit))

    def cancel(self, cancel: Cancel) -> bool:
        return self._inbox.put(cancel)

    def drop_origin(self, origin: Origin) -> None:
        self._inbox.put(DropOrigin(origin=origin))

    def wake(self, wake: Wake) -> None:
        self._inbox.put(wake)

    def hear_of_graphs(self, news: GraphNews) -> None:
        if self._conductor is not None:
            self._conductor.on_news(news)

    def see_map(self, expert_map: ExpertMap) -> None:
        """A map is there; it is handed over once its members' links are open."""
        if self._conductor is not None:
            self._conductor.hear(expert_map)

    def hand_map(self, expert_map: ExpertMap) -> None:
        self._inbox.put(NewMap(expert_map=expert_map, seen_at=self._clock.now()))

    def hold(self, epoch: Epoch) -> None:
        if self._conductor is not None:
            self._conductor.hold(epoch)
        else:
            self._inbox.put(Hold(epoch=epoch))

    def condemn(self, dead: Member, epoch: Epoch) -> None:
        """A verdict on a peer: where messages carry no epoch, it ends the waits for it."""
        if self._conductor is not None:
            self._conductor.condemn(dead, epoch)

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
