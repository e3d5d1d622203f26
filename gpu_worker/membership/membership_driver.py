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
from gpu_worker.membership.doubt_reporter import DoubtReporter, Surroundings
from gpu_worker.membership.link_keeper import DataEndpoint, LinkKeeper
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
    RankRecord,
    SlotContents,
    Verdict,
    unpack_map,
    unpack_rank,
)
from shared.store import Store, WatchEvent
from shared.types import Epoch, Member, Operation, Step, SuspicionReason
from shared.wire import GraphBarrierUpdate

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
        surroundings = Surroundings(
            waits=engine.waits,
            others=lambda: self._other_members,
            linked=lambda: membership.record.links,
            send=lambda message, peers: self._links.send(message, peers),
        )
        self.doubts = DoubtReporter(
            membership.record.member, surroundings, keys=keys, clock=clock, leased=leased
        )
        self._links = LinkKeeper(
            member=membership.record.member,
            access=access,
            endpoint=endpoint,
            contact=self._announce_contact,
            opened=self._on_link_opened,
            broken=self._on_link_broken,
            answered=self.doubts.on_answered,
            tasks=tasks,
        )

    def start(self, control_port: int) -> None:
        """Registers this incarnation, which listens on that port, and follows the instance."""
        self._perform(self._membership.on_listening(control_port))
        self._tasks.create_task(self._leased.write())
        self._tasks.create_task(self._keep_lease())
        self._tasks.create_task(self._watch())
        self._tasks.create_task(self._sweep())
        self.doubts.start(self._tasks)

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
            self.doubts.suspect(peer, suspect.reason, suspect.epoch, suspect.step, suspect.detail)
            if suspect.reason is SuspicionReason.LINK:
                self._links.recheck(peer)
            elif suspect.reason is SuspicionReason.EXCHANGE:
                self.doubts.ask([peer])

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
        is_first = True
        async for seen in changes(self._store, self._keys.serving):
            for event in seen.events:
                self._on_event(event)
            if seen.synced and not is_first:
                self._leased.rewrite()
            if seen.synced and not self._is_registered:
                self._leased.recheck_lease()
            is_first = False

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._endpoint.sweep()

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
        self.doubts.on_link_broken(peer)
        self._perform(self._membership.on_link_broken(peer, detail))

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
                self.doubts.forget(peer)
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
                self.doubts.suspect(peer, reason, epoch, Step(0), detail)
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
