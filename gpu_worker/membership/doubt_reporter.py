"""Tells etcd whom this rank doubts, and withdraws it: peers that it waits for or cannot reach, and
the control plane that leads. Asks doubted peers whether they hear it. Decides nothing: see
`peer_suspicions`, `peer_echoes` and `leader_watch`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import structlog

from gpu_worker.membership.leader_watch import LOOK_S as LEADER_LOOK_S
from gpu_worker.membership.leader_watch import LeaderWatch
from gpu_worker.membership.peer_echoes import LOOK_S as ECHOES_LOOK_S
from gpu_worker.membership.peer_echoes import PeerEchoes
from gpu_worker.membership.peer_suspicions import LOOK_S, PeerSuspicions
from shared.clock import Clock
from shared.codec import pack
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import LeaderDoubt, Suspicion
from shared.types import Accuser, Epoch, Member, RankId, Step, SuspicionReason
from shared.wire import Message, Ping, UnheardPeer

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the reporter asks of the rank: `waits` at which step the engine is and for whom it
    waits; `others`, the peers in the newest map; `linked`, those to whom a link is open; and `send`
    a message to those of some peers to whom one is."""

    waits: Callable[[], tuple[tuple[Epoch, Step], Collection[RankId]]]
    others: Callable[[], Collection[Member]]
    linked: Callable[[], Collection[Member]]
    send: Callable[[Message, Iterable[Member]], None]


class DoubtReporter:
    """All methods run on the event loop."""

    def __init__(
        self,
        member: Member,
        surroundings: Surroundings,
        *,
        keys: Keys,
        clock: Clock,
        leased: LeasedKeys,
    ) -> None:
        self._member = member
        self._surroundings = surroundings
        self._keys = keys
        self._clock = clock
        self._leased = leased
        self._suspicions = PeerSuspicions()
        self._echoes = PeerEchoes(clock.now())
        self._asking = asyncio.Event()
        self._leader_watch = LeaderWatch(clock.now())
        self._unheard_leader: str | None = None  # as etcd is to hold it

    def start(self, tasks: asyncio.TaskGroup) -> None:
        tasks.create_task(self._withdraw_suspicions())
        tasks.create_task(self._watch_echoes())
        tasks.create_task(self._watch_leader())

    def unheard(self) -> tuple[UnheardPeer, ...]:
        """The peers that it waits for, and that do not answer its questions."""
        return self._echoes.unheard(self._clock.now())

    def suspect(
        self, peer: Member, reason: SuspicionReason, epoch: Epoch, step: Step, detail: str
    ) -> None:
        """Publishes a suspicion, unless the same was published a moment ago."""
        now = self._clock.now()
        if not self._suspicions.on_suspected(peer, reason, now):
            return
        log.info("peer_suspected", peer=str(peer), reason=reason.value, epoch=epoch, detail=detail)
        suspicion = Suspicion(
            rank=peer.rank,
            incarnation=peer.incarnation,
            by=self._name,
            reason=reason,
            epoch=epoch,
            step=step,
            raised_at=now,
            detail=detail,
        )
        self._leased.put(self._key_of(peer), pack(suspicion))

    def ask(self, peers: Iterable[Member]) -> None:
        """Those of them to which a link is open, whether they hear this rank."""
        linked = set(self._surroundings.linked())
        asked = self._echoes.ask([m for m in peers if m in linked], self._clock.now())
        if asked:
            self._surroundings.send(Ping(nonce=0), asked)
            self._asking.set()

    def on_answered(self, peer: Member) -> None:
        self._echoes.on_answer(peer, self._clock.now())

    def on_link_broken(self, peer: Member) -> None:
        self._echoes.forget(peer)

    def forget(self, peer: Member) -> None:
        """It is gone, and every suspicion of it."""
        self._suspicions.forget(peer)
        self._echoes.forget(peer)
        self._leased.delete(self._key_of(peer), urgent=False)

    def on_control_plane_ping(self, name: str) -> None:
        self._leader_watch.on_ping(name, self._clock.now())
        self._tell_of_leader()

    def on_control_plane_gone(self, name: str) -> None:
        self._leader_watch.on_closed(name)
        self._tell_of_leader()

    async def _withdraw_suspicions(self) -> None:
        """Deletes a suspicion once the peer has answered again. Never returns."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._suspicions.peers:
                continue
            at_step, waiting_for = self._surroundings.waits()
            self.ask([m for m in self._suspicions.peers if m.rank in waiting_for])
            withdrawn = self._suspicions.on_look(
                self._clock.now(),
                at_step=at_step,
                waiting_for=[m for m in self._surroundings.others() if m.rank in waiting_for],
                linked=self._surroundings.linked(),
            )
            for peer in withdrawn:
                log.info("suspicion_withdrawn", peer=str(peer))
                self._leased.delete(self._key_of(peer), urgent=False)

    async def _watch_echoes(self) -> None:
        """Never returns."""
        while True:
            await self._asking.wait()
            await asyncio.sleep(ECHOES_LOOK_S)
            unheard = self._echoes.on_look(self._clock.now())
            self._surroundings.send(Ping(nonce=0), unheard)
            if not self._echoes.is_waiting:
                self._asking.clear()

    async def _watch_leader(self) -> None:
        """Never returns."""
        while True:
            await asyncio.sleep(LEADER_LOOK_S)
            self._leader_watch.on_look(self._clock.now())
            self._tell_of_leader()

    def _tell_of_leader(self) -> None:
        """Says in etcd that the leader is not heard, or no longer says so."""
        unheard = self._leader_watch.unheard(self._clock.now())
        if unheard == self._unheard_leader:
            return
        self._unheard_leader = unheard
        me = self._member
        key = self._keys.leader_doubt(me.rank, me.incarnation)
        if unheard is None:
            self._leased.delete(key, urgent=False)
            return
        log.info("leader_unheard", control_plane=unheard)
        doubt = LeaderDoubt(rank=me.rank, incarnation=me.incarnation, control_plane=unheard)
        self._leased.put(key, pack(doubt))

    @property
    def _name(self) -> str:
        return f"rank-{self._member}"

    def _key_of(self, peer: Member) -> str:
        return self._keys.suspicion(peer.rank, peer.incarnation, Accuser.RANK, self._name)
