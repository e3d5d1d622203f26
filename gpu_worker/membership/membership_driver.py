"""Feeds the rank's membership with what etcd, the links, the loader and the engine report, and
performs its actions. It decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from gpu_worker.membership.link_keeper import LinkKeeper
from gpu_worker.membership.rank_membership import (
    AdoptMap,
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
from shared.clock import Clock
from shared.codec import pack, unpack
from shared.errors import CheckpointError, WireError
from shared.expert_map import ExpertMap, Placement
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import RankRecord, SlotContents, Suspicion, Verdict, unpack_map
from shared.store import Snapshot, Store, WatchEvent
from shared.types import Epoch, Member, RankId, Step, SuspicionReason

log = structlog.get_logger()


class SlotLoader(Protocol):
    """Loads experts into slots; blocking, called off the event loop."""

    def load(self, wanted: Placement) -> Placement:
        """Makes the slots hold `wanted`; returns what they hold. Raises CheckpointError."""
        ...


class PeerReplication(Protocol):
    """Replicas of KV blocks that are kept for peers, and by them."""

    def keep(self, peer: RankRecord) -> None: ...

    def close(self, peer: Member) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCallbacks:
    """How maps, holds and verdicts on peers reach the engine, and how the rank ends."""

    on_map_seen: Callable[[ExpertMap], None]
    enqueue_map: Callable[[ExpertMap], None]
    hold: Callable[[Epoch], None]
    declare_dead: Callable[[Member, Epoch], None]
    leave: Callable[[str], None]


class MembershipDriver:
    """All methods run on the event loop."""

    def __init__(
        self,
        *,
        store: Store,
        keys: Keys,
        clock: Clock,
        membership: RankMembership,
        leased: LeasedKeys,
        loader: SlotLoader,
        engine: EngineCallbacks,
        tasks: asyncio.TaskGroup,
        suspicion_interval_s: float,
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._membership = membership
        self._leased = leased
        self._loader = loader
        self._engine = engine
        self._tasks = tasks
        self._suspicion_interval_s = suspicion_interval_s
        self._suspected_at: dict[tuple[Member, SuspicionReason], float] = {}
        self._links: LinkKeeper | None = None
        self._replication: PeerReplication | None = None

    def attach_links(self, links: LinkKeeper, replication: PeerReplication | None = None) -> None:
        self._links = links
        self._replication = replication

    @property
    def other_members(self) -> tuple[Member, ...]:
        """The peers in the map under which the engine runs."""
        newest, me = self._membership.expert_map, self._membership.record.member
        return tuple(m for m in newest.members if m != me) if newest is not None else ()

    def member_of(self, rank: RankId) -> Member | None:
        return next((m for m in self.other_members if m.rank == rank), None)

    async def watch(self) -> None:
        """Follows everything of the instance, for ever."""
        async for seen in self._store.watch(self._keys.serving):
            if isinstance(seen, Snapshot):
                self._on_snapshot(seen)
            else:
                self._on_event(seen)

    async def keep_lease(self) -> None:
        """That of the agent first, and another after each that is lost: a stalled etcd may expire
        healthy leases, and only a verdict ends an incarnation."""
        while True:
            await self._leased.keep_alive()
            self.perform(self._membership.on_lease_granted(await self._leased.renew()))

    def register(self) -> None:
        """Says for the first time that this incarnation is here."""
        self.perform([PutRecord(record=self._membership.record)])

    def on_link_opened(self, peer: Member) -> None:
        self.perform(self._membership.on_link_opened(peer))

    def on_link_broken(self, peer: Member, detail: str) -> None:
        self.perform(self._membership.on_link_broken(peer, detail))

    def on_adopted(self, expert_map: ExpertMap) -> None:
        self.perform(self._membership.on_adopted(expert_map))

    def on_held(self, epoch: Epoch) -> None:
        self.perform(self._membership.on_held(epoch))

    def suspect(
        self, peer: Member, reason: SuspicionReason, epoch: Epoch, step: Step, detail: str
    ) -> None:
        """One suspicion to etcd; the same again only after a while."""
        now = self._clock.now()
        last = self._suspected_at.get((peer, reason), -1e9)
        if now - last < self._suspicion_interval_s:
            return
        self._suspected_at[peer, reason] = now
        log.info("suspicion", peer=str(peer), reason=reason.value, epoch=epoch, detail=detail)
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
        key = self._keys.suspicion(peer.rank, peer.incarnation, f"rank-{me}")
        self._leased.put(key, pack(suspicion))

    def perform(self, actions: list[MembershipAction]) -> None:
        for action in actions:
            self._perform_one(action)

    def _perform_one(self, action: MembershipAction) -> None:
        match action:
            case OpenLink(peer=peer):
                self._link_keeper.open(peer)
                if self._replication is not None:
                    self._replication.keep(peer)
            case CloseLink(peer=peer):
                self._link_keeper.close(peer)
                if self._replication is not None:
                    self._replication.close(peer)
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
            case AdoptMap(expert_map=expert_map):
                self._engine.enqueue_map(expert_map)
            case SuspectPeer(peer=peer, reason=reason, detail=detail):
                newest = self._membership.expert_map
                epoch = newest.epoch if newest else Epoch(0)
                self.suspect(peer, reason, epoch, Step(0), detail)
            case Leave(reason=reason):
                self._engine.leave(reason)

    @property
    def _link_keeper(self) -> LinkKeeper:
        assert self._links is not None, "attach_links comes before watch"
        return self._links

    async def _load(self, wanted: Placement) -> None:
        try:
            residents = await asyncio.to_thread(self._loader.load, wanted)
        except CheckpointError as error:
            # It ends the rank: no slot is filled with something else. Its next incarnation tries
            # again.
            log.error("slots_not_loaded", detail=str(error))
            raise
        self.perform(self._membership.on_slots_loaded(residents))

    @property
    def _own_key(self) -> str:
        me = self._membership.record.member
        return self._keys.rank(me.rank, me.incarnation)

    def _own_suspicion_key(self, peer: Member) -> str:
        by = f"rank-{self._membership.record.member}"
        return self._keys.suspicion(peer.rank, peer.incarnation, by)

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        present = set()
        for item in snapshot.values:
            self._on_value(item.key, item.value)
            if item.key.startswith(self._keys.ranks):
                present.add(item.key)
        if self._own_key not in present:
            self._leased.recheck_lease()
        for peer in self._membership.peers:
            if self._keys.rank(peer.rank, peer.incarnation) not in present:
                self.perform(self._membership.on_peer_gone(peer.member))

    def _on_event(self, event: WatchEvent) -> None:
        if event.value is not None:
            self._on_value(event.key, event.value)
        elif event.key == self._own_key:
            self._leased.recheck_lease()
        elif event.key.startswith(self._keys.ranks):
            for peer in self._membership.peers:
                if self._keys.rank(peer.rank, peer.incarnation) == event.key:
                    self.perform(self._membership.on_peer_gone(peer.member))

    def _on_value(self, key: str, value: bytes) -> None:
        try:
            self.perform(self._actions_of(key, value))
        except WireError as error:
            log.error("malformed_value", key=key, detail=str(error))

    def _actions_of(self, key: str, value: bytes) -> list[MembershipAction]:
        keys, membership = self._keys, self._membership
        if key == keys.map:
            expert_map = unpack_map(value)
            self._engine.on_map_seen(expert_map)
            return membership.on_map(expert_map)
        if key.startswith(keys.ranks):
            return membership.on_peer_record(unpack(value, RankRecord))
        if key.startswith(keys.assignments):
            return membership.on_assignment(unpack(value, SlotContents))
        if key.startswith(keys.verdicts):
            verdict = unpack(value, Verdict)
            dead = Member(rank=verdict.rank, incarnation=verdict.incarnation)
            if dead != membership.record.member:
                self._engine.declare_dead(dead, verdict.epoch)
            return membership.on_verdict(dead)
        return []
