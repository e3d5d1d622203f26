"""The membership of this incarnation in its instance: which links to open, what to load, what to
publish in etcd, when the engine may adopt a map, and when to leave. Pure: events in, actions out.

Theory of operation. A rank learns of its peers from their records. It opens a link to each, and its
own record lists the links that are open. It loads what the control plane assigns and publishes what
its slots hold. The control plane puts it into a map only after both, so adopting a map rarely
waits. The engine may adopt a map once every member's link is open and the own slots hold what the
map says. Until then the map is postponed, and a newer one replaces it. The slots may differ from
the map: an assignment that was replaced before its load ended has overwritten what the control
plane takes for resident. Maps and assignments are ordered: the assignment of epoch e comes after
map e, and before map e + 1. The last of them that says something of a slot decides what is loaded
there (`_target`).

    event                  actions
    server listens         residents, if the process was fenced before and has kept its slots; our
                           record, for the first time
    peer's record appears  OpenLink
    peer's record goes     CloseLink, and our record without the link. For a member only once a map
                           leaves it out: its lease may have expired although it runs
    link opened            our record again; AdoptMap, if a postponed map can be adopted now
    link broken            SuspectPeer(LINK) if it is a member; our record again
    assignment             residents again, without what they lose by it; LoadSlots of what
                           differs, one load at a time. HoldEngine first, if it takes a slot that
                           the engine's map names. Either a newer map empties the slot, and the
                           engine may be unable to adopt it, or an orphan replaces a surplus replica
                           after a death; no step can complete anyway. If messages carry no epoch
                           (`peers_may_lag`), peers that still run an older map use the slot as
                           well, so a member always holds first
    slots loaded           residents again; AdoptMap, if a postponed map can be adopted now;
                           LoadSlots if the assignment has changed meanwhile
    map                    AnnounceMap; AdoptMap, or postponed; LoadSlots of what it says, if the
                           slots do not hold it. Leave, if it says that this incarnation is dead. If
                           it was planned without us, AdoptMap: the engine goes on until all know
    engine adopted a map   LoadSlots that waited for it
    engine held            LoadSlots that waited for it
    engine stopped         Leave
    verdict                on a peer AnnounceVerdict, on this incarnation Leave
    told to leave          our record, which asks to be drained
    another lease granted  our record and residents again
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shared.expert_map import ExpertMap, Placement
from shared.records import RankRecord, SlotContents
from shared.types import EMPTY_SLOT, Epoch, Member, RankState, SuspicionReason


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLink:
    peer: RankRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseLink:
    peer: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSlots:
    """Load `wanted[layer, slot]` wherever it differs from what the slots hold."""

    wanted: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldEngine:
    """Run no more steps under the map of `epoch` or an older one; then call `on_held`."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class PutRecord:
    """`urgent`: somebody waits for it."""

    record: RankRecord
    urgent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PutResidents:
    contents: SlotContents


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceMap:
    """A newer map with this rank is published. `AdoptMap` follows, unless a yet newer map comes
    first. Ranks that count graphs must know of it at once: it decides what they launch next."""

    expert_map: ExpertMap


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptMap:
    """The engine may adopt this map now."""

    expert_map: ExpertMap


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceVerdict:
    """A verdict on a peer. Ranks that count graphs stop waiting for it at once; on CPU ranks only
    the map of `epoch` ends a wait. That map, which may not be here yet, is without the peer."""

    peer: Member
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspectPeer:
    peer: Member
    reason: SuspicionReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """This incarnation is fenced or cannot go on: drop the work and end."""

    reason: str


MembershipAction = (
    OpenLink
    | CloseLink
    | LoadSlots
    | HoldEngine
    | PutRecord
    | PutResidents
    | AnnounceMap
    | AdoptMap
    | AnnounceVerdict
    | SuspectPeer
    | Leave
)


class RankMembership:
    """Holds the state of the table above."""

    def __init__(
        self, record: RankRecord, residents: Placement, *, peers_may_lag: bool = False
    ) -> None:
        """`record` is what the rank publishes of itself; its port is not known yet."""
        self.record = record
        self._peers_may_lag = peers_may_lag
        self._member = record.member
        self._peers: dict[Member, RankRecord] = {}
        self._open: set[Member] = set()
        self._gone: set[Member] = set()
        self._residents = residents
        self._wanted: Placement | None = None
        self._wanted_epoch = Epoch(0)
        self._wanted_number = 0
        none = np.full_like(residents, EMPTY_SLOT)
        self._published: SlotContents | None = SlotContents.of(self._member, none, number=0)
        self._engine_held_epoch = Epoch(0)
        self._loading: NDArray[np.bool_] | None = None  # which slots
        self._map: ExpertMap | None = None
        self._postponed_map: ExpertMap | None = None
        self._adopted: ExpertMap | None = None
        self._judged: set[Member] = set()  # members of the newest map on whom there is a verdict
        self._left_out: set[Member] = set()  # without a verdict
        self._was_member = False

    @property
    def expert_map(self) -> ExpertMap | None:
        """The newest map that was handed to the engine."""
        return self._map

    @property
    def running_map(self) -> ExpertMap | None:
        """The newest map that the engine has adopted."""
        return self._adopted

    @property
    def peers(self) -> tuple[RankRecord, ...]:
        return tuple(self._peers.values())

    def knows(self, member: Member) -> bool:
        """Whether it has a record, or is in the newest map: a member's lease may have expired
        although it runs."""
        return member in self._peers

    def on_listening(self, control_port: int) -> list[MembershipAction]:
        """The control server accepts connections."""
        self.record = replace(self.record, control_port=control_port)
        actions: list[MembershipAction] = []
        if (self._residents >= 0).any():  # of the process's former incarnation
            # First: what it is assigned when its record appears depends on what it holds.
            actions += self._publish_residents()
        return [*actions, PutRecord(record=self.record)]

    def on_peer_record(self, record: RankRecord) -> list[MembershipAction]:
        peer = record.member
        if peer == self._member or peer.rank == self._member.rank:
            return []
        known = peer in self._peers
        self._peers[peer] = record
        self._gone.discard(peer)
        return [] if known else [OpenLink(peer=record)]

    @property
    def left_out(self) -> tuple[Member, ...]:
        return tuple(sorted(self._left_out))

    def on_peer_gone(self, peer: Member) -> list[MembershipAction]:
        self._left_out.discard(peer)
        if peer not in self._peers:
            return []
        self._gone.add(peer)
        return self._drop_gone()

    def on_link_opened(self, peer: Member) -> list[MembershipAction]:
        if peer not in self._peers or peer in self._open:
            return []
        self._open.add(peer)
        return self._publish_links() + self._adopt_if_able()

    def on_link_broken(self, peer: Member, detail: str) -> list[MembershipAction]:
        """An open link failed, or could not be opened. The link keeper tries again until the peer's
        record is gone."""
        if peer not in self._peers:
            return []
        newest, was_open = self._postponed_map or self._map, peer in self._open
        if not was_open:
            return []
        self._open.discard(peer)
        actions = self._publish_links(urgent=False)
        if newest is not None and newest.has(peer):
            actions.append(SuspectPeer(peer=peer, reason=SuspicionReason.LINK, detail=detail))
        return actions

    def on_assignment(self, contents: SlotContents) -> list[MembershipAction]:
        if contents.member != self._member:
            return []
        self._wanted = contents.array()
        self._wanted_epoch = contents.epoch
        self._wanted_number = contents.number or 0
        return self._say_and_load()

    def on_slots_loaded(self, residents: Placement) -> list[MembershipAction]:
        """A load ended; `residents` is what the slots hold now."""
        self._loading = None
        self._residents = residents
        self._published = None
        put = self._publish_residents()
        return [*put, *self._adopt_if_able(), *self._load_if_needed()]

    def on_adopted(self, expert_map: ExpertMap) -> list[MembershipAction]:
        """The engine runs under this map from now on."""
        self._adopted = expert_map
        return self._load_if_needed()

    def on_held(self, epoch: Epoch) -> list[MembershipAction]:
        """The engine runs no step until a map newer than `epoch` is adopted."""
        self._engine_held_epoch = max(self._engine_held_epoch, epoch)
        return self._load_if_needed()

    def on_engine_stopped(self, reason: str) -> list[MembershipAction]:
        """The engine, or the barrier that it meets its peers by, cannot go on in this
        incarnation."""
        return [Leave(reason=reason)]

    def on_map(self, expert_map: ExpertMap) -> list[MembershipAction]:
        newest = self._postponed_map or self._map
        if newest is not None:
            if expert_map.epoch <= newest.epoch:
                return []
            gone = {m for m in newest.members if not expert_map.has(m)}
            self._left_out |= {m for m in gone if m in self._peers} - self._judged
            self._judged -= gone
        if expert_map.has(self._member):
            self._was_member = True
            self._postponed_map = expert_map
            return [
                AnnounceMap(expert_map=expert_map),
                *self._drop_gone(),
                *self._adopt_if_able(),
                *self._say_and_load(),
            ]
        steps = self._adopted is not None and not self._peers_may_lag
        if steps and expert_map.is_planned:
            self._postponed_map, self._map = None, expert_map
            return [*self._drop_gone(), AdoptMap(expert_map=expert_map)]
        successor = expert_map.incarnation_of(self._member.rank)
        if self._was_member or (successor or 0) > self._member.incarnation:
            return [Leave(reason=f"the map of epoch {expert_map.epoch} leaves this rank out")]
        self._map = expert_map
        return self._drop_gone() + self._load_if_needed()

    def on_verdict(
        self, member: Member, epoch: Epoch, *, is_drained: bool = False
    ) -> list[MembershipAction]:
        """The map of `epoch` is the first without this member, which is dead, or `is_drained`."""
        if member != self._member:
            self._left_out.discard(member)
            newest = self._postponed_map or self._map
            if newest is not None and newest.has(member):
                self._judged.add(member)
            return [AnnounceVerdict(peer=member, epoch=epoch)]
        if is_drained:
            # Where steps carry an epoch, the map that leaves it out says when: see `on_map`.
            return [Leave(reason="it has been drained")] if self._peers_may_lag else []
        return [Leave(reason="the control plane declared this rank dead")]

    def on_told_to_leave(self) -> list[MembershipAction]:
        """Its process shall end: the control plane is asked to drain it first."""
        self.record = replace(self.record, leaving=True)
        return [PutRecord(record=self.record)]

    def on_lease_granted(self, lease_id: int) -> list[MembershipAction]:
        """The keys of the old lease are gone; publish them again under this one."""
        self.record = replace(self.record, lease_id=lease_id)
        self._published = None
        return [PutRecord(record=self.record), *self._publish_residents()]

    def _drop_gone(self) -> list[MembershipAction]:
        newest = self._postponed_map or self._map
        dropped = {p for p in self._gone if newest is None or not newest.has(p)}
        self._gone -= dropped
        return [action for peer in sorted(dropped) for action in self._drop(peer)]

    def _drop(self, peer: Member) -> list[MembershipAction]:
        del self._peers[peer]
        actions: list[MembershipAction] = [CloseLink(peer=peer)]
        if peer in self._open:
            self._open.discard(peer)
            actions += self._publish_links(urgent=False)
        return actions

    def _adopt_if_able(self) -> list[MembershipAction]:
        postponed = self._postponed_map
        if postponed is None or any(
            m != self._member and m not in self._open for m in postponed.members
        ):
            return []
        if self._missing_slots(postponed).any():
            return []
        self._postponed_map = None
        self._map = postponed
        return [AdoptMap(expert_map=postponed)]

    def _publish_links(self, *, urgent: bool = True) -> list[MembershipAction]:
        self.record = replace(self.record, links=tuple(sorted(self._open)))
        return [PutRecord(record=self.record, urgent=urgent)]

    def _say_and_load(self) -> list[MembershipAction]:
        """After a change of what the slots shall hold. The control plane first learns which of them
        are lost: by the next assignment it may want back what a load is about to overwrite."""
        return [*self._publish_residents(), *self._load_if_needed()]

    def _publish_residents(self) -> list[MembershipAction]:
        """What the slots hold and go on to hold, unless that was said."""
        keeps = self._target() == self._residents
        if self._loading is not None:
            keeps &= ~self._loading
        contents = SlotContents.of(
            self._member,
            np.where(keeps, self._residents, EMPTY_SLOT),
            number=self._wanted_number,
        )
        if contents == self._published:
            return []
        self._published = contents
        return [PutResidents(contents=contents)]

    def _load_if_needed(self) -> list[MembershipAction]:
        if self._loading is not None:
            return []
        target = self._target()
        differs = target != self._residents
        if not differs.any():
            return self._publish_ready() if self._wanted is not None else []
        newest = self._postponed_map or self._map
        newest_epoch = newest.epoch if newest is not None else Epoch(0)
        if self._wanted is not None and self._wanted_epoch > newest_epoch:
            return []
        if newest is not None and self._gives_up(newest, differs):
            last = newest_epoch
        else:
            last = Epoch(newest_epoch - 1)
        if self._is_used_by_engine(differs) or self._may_be_used_by_peers(last):
            assert newest is not None, "an engine with a map, and no map"
            is_adopting = newest.is_planned and newest is self._map and not self._peers_may_lag
            if is_adopting and last < newest_epoch:
                return []  # the engine adopts it soon, with the others
            return [HoldEngine(epoch=last)]
        self._loading = differs
        return [LoadSlots(wanted=target)]

    def _target(self) -> Placement:
        """What the own slots shall hold: one expert per slot, by the newest map and the assignment
        alone. So a slot's target changes only with a new map or a new assignment, and nothing is
        loaded twice. An assignment of epoch e is decided knowing map e and may give up slots of it;
        map e + 1 outranks that assignment, except for slots that it leaves empty."""
        newest = self._postponed_map or self._map
        base = self._residents if self._wanted is None else self._wanted
        if newest is None or not newest.has(self._member):
            return base
        if self._wanted is not None and self._wanted_epoch >= newest.epoch:
            return base
        row = newest.placement[:, self._member.rank]
        return np.where(row >= 0, row, base)

    def _gives_up(self, expert_map: ExpertMap, slots: NDArray[np.bool_]) -> bool:
        """Whether one of these own slots shall hold something else than this map says."""
        if not expert_map.has(self._member):
            return False
        row = expert_map.placement[:, self._member.rank]
        return bool((slots & (row >= 0) & (row != self._target())).any())

    def _missing_slots(self, expert_map: ExpertMap) -> NDArray[np.bool_]:
        """Own slots that do not hold what the map says, or may not hold it any more, or shall hold
        something else. Under a map that an assignment takes a slot from, no step could complete."""
        row = expert_map.placement[:, self._member.rank]
        unsure: NDArray[np.bool_] = (row != self._residents) | (row != self._target())
        if self._loading is not None:
            unsure |= self._loading
        return unsure & (row >= 0)

    def _is_used_by_engine(self, differs: NDArray[np.bool_]) -> bool:
        """Whether a slot to load may be used by a step that runs now."""
        adopted = self._adopted
        if adopted is None or adopted.epoch <= self._engine_held_epoch:
            return False
        return self._names(adopted, differs)

    def _may_be_used_by_peers(self, last: Epoch) -> bool:
        """Whether a peer may still run a map that names such a slot. `last` is the last such
        map."""
        return self._peers_may_lag and self._adopted is not None and self._engine_held_epoch < last

    def _names(self, expert_map: ExpertMap, slots: NDArray[np.bool_]) -> bool:
        """Whether the map says that one of these own slots holds an expert."""
        return bool((slots & (expert_map.placement[:, self._member.rank] >= 0)).any())

    def _publish_ready(self) -> list[MembershipAction]:
        if self.record.state is not RankState.STARTING:
            return []
        self.record = replace(self.record, state=RankState.READY)
        return [PutRecord(record=self.record)]
