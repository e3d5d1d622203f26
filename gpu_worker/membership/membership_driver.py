"""Feeds `RankMembership` with what etcd, the links, the loader and the engine report, and performs
its actions. Decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import structlog

from gpu_worker.engine.engine_client import EngineClient
from gpu_worker.engine.mailbox import Suspect
from gpu_worker.membership.announcements import Announcements
from gpu_worker.membership.leader_watch import LOOK_S as LEADER_LOOK_S
from gpu_worker.membership.leader_watch import LeaderWatch
from gpu_worker.membership.link_keeper import DataEndpoint, LinkKeeper
from gpu_worker.membership.peer_echoes import LOOK_S as ECHOES_LOOK_S
from gpu_worker.membership.peer_echoes import PeerEchoes
from gpu_worker.membership.peer_suspicions import LOOK_S, PeerSuspicions
from gpu_worker.membership.rank_membership import (
    AdoptMap,
    AnnounceMap,
    AnnounceVerdict,
    CloseLink,
    HoldEngine,
    Leave,
    LoadSlots,
    MembershipAction,
    OpenLink,
    PutRecord,
    PutResidents,
    RankMembership,
    SuspectPeer,
)
from shared.changes import changes
from shared.clock import Clock
from shared.codec import pack, unpack
from shared.errors import CheckpointError, OtherRelease, WireError
from shared.expert_map import ExpertMap, Placement
from shared.handshake import Access
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import (
    LeaderDoubt,
    RankRecord,
    SlotContents,
    Suspicion,
    Verdict,
    unpack_map,
    unpack_rank,
)
from shared.store import Store, WatchEvent
from shared.types import Accuser, Epoch, Member, Operation, Step, SuspicionReason
from shared.wire import GraphBarrierUpdate, Ping, UnheardPeer

log = structlog.get_logger()

SWEEP_S = 10.0


class SlotLoader(Protocol):
    """Loads experts into slots. Blocks, so it is called off the event loop."""

    def load(self, wanted: Placement) -> Placement:
        """Makes the slots hold `wanted`; returns what they hold. Raises CheckpointError."""
        ...


class PeerReplication(Protocol):
    """KV replicas that this rank keeps for its peers, and they for it."""

    def keep(self, peer: RankRecord) -> None: ...

    def close(self, peer: Member) -> None: ...


class MembershipDriver:
    """All methods run on the event loop."""

    def __init__(
        self,
        *,
        store: Store,
        keys: Keys,
        clock: Clock,
        membership: RankMembership,
        access: Access,
        leased: LeasedKeys,
        loader: SlotLoader,
        endpoint: DataEndpoint,
        engine: EngineClient,
        announcements: Announcements,
        replication: PeerReplication | None,
        leave: Callable[[str], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        """`leave` ends the rank, for the reason given. `tasks` owns what `start` begins."""
        self._store = store
        self._keys = keys
        self._clock = clock
        self._membership = membership
        self._leased = leased
        self._loader = loader
        self._load_ended: asyncio.Future[Placement] | None = None
        self._endpoint = endpoint
        self._engine = engine
        self._announcements = announcements
        self._mapping: int | None = None  # the announcement for the map that is being adopted
        self._replication = replication
        self._leave = leave
        self._tasks = tasks
        self._is_registered = False  # etcd holds the own record, as far as the watch has shown
        self._suspicions = PeerSuspicions()
        self._echoes = PeerEchoes(clock.now())
        self._asking = asyncio.Event()
        self._leader_watch = LeaderWatch(clock.now())
        self._unheard_leader: str | None = None  # as etcd holds it
        self._links = LinkKeeper(
            member=membership.record.member,
            access=access,
            endpoint=endpoint,
            contact=self._announce_contact,
            opened=self._on_link_opened,
            broken=self._on_link_broken,
            answered=self._on_answered,
            tasks=tasks,
        )

    def start(self, control_port: int) -> None:
        """Registers this incarnation, which listens on that port, and follows the instance."""
        self._perform(self._membership.on_listening(control_port))
        self._tasks.create_task(self._leased.write())
        self._tasks.create_task(self._keep_lease())
        self._tasks.create_task(self._watch())
        self._tasks.create_task(self._sweep())
        self._tasks.create_task(self._withdraw_suspicions())
        self._tasks.create_task(self._watch_echoes())
        self._tasks.create_task(self._watch_leader())

    def knows(self, member: Member) -> bool:
        """Whether it is registered, or in the newest map."""
        return self._membership.knows(member)

    @property
    def left_out(self) -> tuple[Member, ...]:
        """Members that maps have left out, and on whom no verdict has been seen."""
        return self._membership.left_out

    def on_offered_map(self, packed: bytes) -> None:
        """A control plane gives the next map itself, because etcd cannot be written or is out of
        this rank's reach. Raises WireError if it is none."""
        expert_map = unpack_map(packed)
        log.info("map_offered", epoch=expert_map.epoch, cause=expert_map.cause)
        self._perform(self._membership.on_map(expert_map))

    def unheard(self) -> tuple[UnheardPeer, ...]:
        """The peers that it waits for, and that do not answer its questions."""
        return self._echoes.unheard(self._clock.now())

    def on_control_plane_ping(self, name: str) -> None:
        self._leader_watch.on_ping(name, self._clock.now())
        self._tell_of_leader()

    def on_control_plane_gone(self, name: str) -> None:
        self._leader_watch.on_closed(name)
        self._tell_of_leader()

    def ask_to_leave(self) -> bool:
        """Asks to be drained. False if no other rank could take over."""
        me = self._membership.record.member
        newest = self._membership.expert_map
        if newest is None or not newest.has(me) or not self._other_members:
            return False
        self._perform(self._membership.on_told_to_leave())
        return True

    async def wait_for_load(self) -> None:
        """Returns once no load runs, though its task was cancelled: the slots may be used again."""
        if self._load_ended is not None:
            await asyncio.wait([self._load_ended])

    def on_adopted(self, expert_map: ExpertMap) -> None:
        self._end_mapping()
        self._perform(self._membership.on_adopted(expert_map))

    def on_held(self, epoch: Epoch) -> None:
        self._perform(self._membership.on_held(epoch))

    def on_engine_stopped(self, reason: str) -> None:
        self._perform(self._membership.on_engine_stopped(reason))

    def on_suspect(self, suspect: Suspect) -> None:
        """Ignored if no peer of this rank is in the engine's map any more."""
        peer = next((m for m in self._other_members if m.rank == suspect.rank), None)
        if peer is not None:
            self._suspect(peer, suspect.reason, suspect.epoch, suspect.step, suspect.detail)
            if suspect.reason is SuspicionReason.LINK:
                self._links.recheck(peer)
            elif suspect.reason is SuspicionReason.EXCHANGE:
                self._ask([peer])

    def send_wake(self, epoch: Epoch, step: Step) -> None:
        """Tells all other members that this step has work, also those that a newer map has not."""
        running = self._membership.running_map
        peers = {*self._other_members, *(running.members if running is not None else ())}
        self._links.wake(sorted(peers - {self._membership.record.member}), epoch, step)

    def send_update(self, update: GraphBarrierUpdate, peers: Iterable[Member]) -> None:
        self._links.send(update, peers)

    @property
    def _other_members(self) -> tuple[Member, ...]:
        """The peers in the newest map that the engine may adopt."""
        newest, me = self._membership.expert_map, self._membership.record.member
        return tuple(m for m in newest.members if m != me) if newest is not None else ()

    async def _watch(self) -> None:
        """Follows the keys under `serving/`. Never returns."""
        async for seen in changes(self._store, self._keys.serving):
            for event in seen.events:
                self._on_event(event)
            if seen.synced and not self._is_registered:
                self._leased.recheck_lease()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._endpoint.sweep()

    async def _withdraw_suspicions(self) -> None:
        """Deletes a suspicion once the peer has answered again. Never returns."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._suspicions.peers:
                continue
            at_step, waiting_for = self._engine.waits()
            self._ask([m for m in self._suspicions.peers if m.rank in waiting_for])
            withdrawn = self._suspicions.on_look(
                self._clock.now(),
                at_step=at_step,
                waiting_for=[m for m in self._other_members if m.rank in waiting_for],
                linked=self._membership.record.links,
            )
            for peer in withdrawn:
                log.info("suspicion_withdrawn", peer=str(peer))
                self._leased.delete(self._own_suspicion_key(peer), urgent=False)

    def _ask(self, peers: Iterable[Member]) -> None:
        """Those of them to which a link is open, whether they hear this rank."""
        linked = set(self._membership.record.links)
        asked = self._echoes.ask([m for m in peers if m in linked], self._clock.now())
        if asked:
            self._links.send(Ping(nonce=0), asked)
            self._asking.set()

    async def _watch_echoes(self) -> None:
        """Never returns."""
        while True:
            await self._asking.wait()
            await asyncio.sleep(ECHOES_LOOK_S)
            unheard = self._echoes.on_look(self._clock.now())
            self._links.send(Ping(nonce=0), unheard)
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
        me = self._membership.record.member
        key = self._keys.leader_doubt(me.rank, me.incarnation)
        if unheard is None:
            self._leased.delete(key, urgent=False)
            return
        log.info("leader_unheard", control_plane=unheard)
        doubt = LeaderDoubt(rank=me.rank, incarnation=me.incarnation, control_plane=unheard)
        self._leased.put(key, pack(doubt))

    def _on_answered(self, peer: Member) -> None:
        self._echoes.on_answer(peer, self._clock.now())

    async def _keep_lease(self) -> None:
        """The agent's lease first, and another one after each that is lost: a stalled etcd may
        expire healthy leases, and only a verdict ends an incarnation."""
        while True:
            await self._leased.keep_alive()
            self._perform(self._membership.on_lease_granted(await self._leased.renew()))

    def _on_link_opened(self, peer: Member) -> None:
        self._engine.on_link_opened(peer)
        self._perform(self._membership.on_link_opened(peer))

    def _on_link_broken(self, peer: Member, detail: str) -> None:
        self._engine.on_link_broken(peer)
        self._echoes.forget(peer)
        self._perform(self._membership.on_link_broken(peer, detail))

    def _suspect(
        self, peer: Member, reason: SuspicionReason, epoch: Epoch, step: Step, detail: str
    ) -> None:
        """Publishes a suspicion, unless the same was published a moment ago."""
        now = self._clock.now()
        if not self._suspicions.on_suspected(peer, reason, now):
            return
        log.info("peer_suspected", peer=str(peer), reason=reason.value, epoch=epoch, detail=detail)
        me = self._membership.record.member
        suspicion = Suspicion(
            rank=peer.rank,
            incarnation=peer.incarnation,
            by=f"rank-{me}",
            reason=reason,
            epoch=epoch,
            step=step,
            raised_at=now,
            detail=detail,
        )
        self._leased.put(self._own_suspicion_key(peer), pack(suspicion))

    def _perform(self, actions: list[MembershipAction]) -> None:
        for action in actions:
            self._perform_one(action)

    def _perform_one(self, action: MembershipAction) -> None:
        match action:
            case OpenLink(peer=peer):
                self._links.open(peer)
                if self._replication is not None:
                    self._replication.keep(peer)
            case CloseLink(peer=peer):
                self._links.close(peer)
                self._engine.on_link_closed(peer)
                if self._replication is not None:
                    self._replication.close(peer)
                self._suspicions.forget(peer)
                self._echoes.forget(peer)
                self._leased.delete(self._own_suspicion_key(peer), urgent=False)
            case LoadSlots(wanted=wanted):
                self._tasks.create_task(self._load(wanted))
            case HoldEngine(epoch=epoch):
                self._engine.hold(epoch)
            case PutRecord(record=record, urgent=urgent):
                key = self._keys.rank(record.rank, record.incarnation)
                self._leased.put(key, pack(record), urgent=urgent)
            case PutResidents(contents=contents):
                self._leased.put(
                    self._keys.resident(contents.rank, contents.incarnation), pack(contents)
                )
            case AnnounceMap(expert_map=expert_map):
                self._engine.announce_map(expert_map)
            case AdoptMap(expert_map=expert_map):
                self._announce_mapping(expert_map)
                self._engine.adopt_map(expert_map)
            case AnnounceVerdict(peer=peer, epoch=epoch):
                self._engine.declare_dead(peer, epoch)
            case SuspectPeer(peer=peer, reason=reason, detail=detail):
                newest = self._membership.expert_map
                epoch = newest.epoch if newest else Epoch(0)
                self._suspect(peer, reason, epoch, Step(0), detail)
            case Leave(reason=reason):
                self._leave(reason)

    def _announce_contact(self) -> AbstractContextManager[None]:
        if not self._engine.counts_graphs:
            return nullcontext()
        return self._announcements.during(Operation.MAP)

    def _announce_mapping(self, expert_map: ExpertMap) -> None:
        """Ranks on cards map joiners as they adopt their map. Until then the engine may wait."""
        self._end_mapping()
        if expert_map.joiners and self._engine.counts_graphs:
            self._mapping = self._announcements.begin(Operation.MAP)

    def _end_mapping(self) -> None:
        if self._mapping is not None:
            self._announcements.end(self._mapping)
            self._mapping = None

    async def _load(self, wanted: Placement) -> None:
        loop = asyncio.get_running_loop()
        try:
            with self._announcements.during(Operation.LOAD):
                self._load_ended = loop.run_in_executor(None, self._loader.load, wanted)
                residents = await asyncio.shield(self._load_ended)
        except CheckpointError as error:
            # This ends the rank, and its next incarnation tries again: a slot is never filled with
            # something else.
            log.error("slots_not_loaded", detail=str(error))
            raise
        self._perform(self._membership.on_slots_loaded(residents))

    @property
    def _own_key(self) -> str:
        me = self._membership.record.member
        return self._keys.rank(me.rank, me.incarnation)

    def _own_suspicion_key(self, peer: Member) -> str:
        by = f"rank-{self._membership.record.member}"
        return self._keys.suspicion(peer.rank, peer.incarnation, Accuser.RANK, by)

    def _on_event(self, event: WatchEvent) -> None:
        if event.key == self._own_key:
            self._is_registered = event.value is not None
            if event.value is None:
                self._leased.recheck_lease()
        if event.value is not None:
            self._on_value(event.key, event.value)
        elif event.key.startswith(self._keys.ranks):
            for peer in self._membership.peers:
                if self._keys.rank(peer.rank, peer.incarnation) == event.key:
                    self._perform(self._membership.on_peer_gone(peer.member))

    def _on_value(self, key: str, value: bytes) -> None:
        try:
            self._perform(self._feed_membership(key, value))
        except OtherRelease as error:
            log.error("rank_refused", key=key, detail=str(error))
        except WireError as error:
            log.error("malformed_value", key=key, detail=str(error))

    def _feed_membership(self, key: str, value: bytes) -> list[MembershipAction]:
        keys, membership = self._keys, self._membership
        if key == keys.map:
            return membership.on_map(unpack_map(value))
        if key.startswith(keys.ranks):
            return membership.on_peer_record(unpack_rank(value, f"rank {membership.record.rank}"))
        if key.startswith(keys.assignments):
            return membership.on_assignment(unpack(value, SlotContents))
        if key.startswith(keys.verdicts):
            verdict = unpack(value, Verdict)
            is_drained = verdict.cause is SuspicionReason.DRAINED
            return membership.on_verdict(verdict.member, verdict.epoch, is_drained=is_drained)
        return []
