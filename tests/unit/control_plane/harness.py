"""A small instance in one thread, for tests of membership: in-memory etcd, leaders that may fall,
and ranks that load, die, hang and come back. Every published map is checked against what they
hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from control_plane.desired_changes import Change, change_desired
from control_plane.detector_timings import DetectorTimings
from control_plane.leader_term import LeaderTerm
from control_plane.membership import MembershipPolicy
from control_plane.planned_change import DrainPolicy
from control_plane.probe_events import ProbeConnected, ProbePong, ProbeRefused
from control_plane.publisher import Publisher
from control_plane.rebalancer import RebalancePolicy
from control_plane.state_applier import StateApplier, StateChange
from control_plane.writes import (
    Assign,
    Decision,
    DeclareDead,
    DeleteKeys,
    PlanHeal,
    PublishDesired,
    PublishMap,
    Write,
)
from shared.desired_state import DesiredState
from shared.errors import TxnConflict
from shared.expert_map import ExpertMap, Placement
from shared.keys import Keys
from shared.records import (
    InstanceSpec,
    LeaderRecord,
    RankRecord,
    SlotContents,
    Suspicion,
    pack_record,
    unpack_map,
    unpack_record,
)
from shared.store import Compare, Put, Snapshot, WatchEvent
from shared.types import (
    EMPTY_SLOT,
    Accuser,
    Epoch,
    Incarnation,
    Member,
    NodeId,
    RankId,
    RankState,
    Step,
    SuspicionReason,
)
from shared.wire import LatePeer, Load, Pong
from tests.support.fake_clock import FakeClock
from tests.support.memory_store import MemoryEtcd

LOADING = -9
TTL_S = 5.0
POLICY = MembershipPolicy(
    bytes_per_expert=1,
    formation_grace_s=0.5,
    first_formation_grace_s=1.0,
    formation_window_s=2.0,
    heal_after_s=1.0,
    joiner_timeout_s=3.0,
    heal_budget_bytes=3,
    adoption_timeout_s=3.0,
    drains=DrainPolicy(straggler_after_s=4.0),
    rebalance=RebalancePolicy(time_constant_s=20.0, stuck_s=15.0),
)
LOAD = Load(running=0, waiting=0, tokens=0, kv_blocks_free=1, kv_blocks=1)


def spec(
    *, ranks: int = 4, experts: int = 6, slots: int = 3, redundant: int = 6, layers: int = 2
) -> InstanceSpec:
    return InstanceSpec(
        model_name="tiny",
        model_path="/tiny",
        num_moe_layers=layers,
        num_experts=experts,
        num_ranks=ranks,
        slots_per_rank=slots,
        redundant_experts=redundant,
        context_tokens_max=64,
        vocab_size=64,
    )


class Rank:
    """One incarnation: `actual_contents` is what its memory holds, LOADING while a slot is
    overwritten."""

    def __init__(self, harness: ControlPlaneHarness, member: Member) -> None:
        self._harness = harness
        self.member = member
        shape = (harness.spec.num_moe_layers, harness.spec.slots_per_rank)
        self.actual_contents: Placement = np.full(shape, EMPTY_SLOT, dtype=np.int16)
        self.loading: Placement | None = None
        self.answering = True
        self.lagging_epoch: Epoch | None = None  # None: the newest map
        self.out_of_step = Epoch(0)
        self.registered = False
        self.sessions = 0
        self.step = Step(0)
        self.step_ms = 0.0  # 0: it takes no steps
        self.late_peers: tuple[LatePeer, ...] = ()
        self.lease_id = harness.etcd.grant(TTL_S)
        self.record = RankRecord(
            rank=member.rank,
            incarnation=member.incarnation,
            node=NodeId(f"n{member.rank % 2}"),
            pid=1,
            lease_id=self.lease_id,
            state=RankState.STARTING,
            control_host="h",
            control_port=1,
            transfer_name="t",
            slots=harness.spec.slots_per_rank,
            kv_blocks=1,
            kv_block_tokens=1,
            exchange="local",
            first_incarnation=member.incarnation,
        )

    def write_record(self, **changes: object) -> None:
        self.record = replace(self.record, **changes)  # type: ignore[arg-type]
        self._put(self._harness.keys.rank(*self._ids), pack_record(self.record))
        self.registered = True

    def begin_load(self) -> bool:
        """As a rank's standing rules: never into a slot in use, unless an orphan needs it."""
        contents = self._assignment()
        if contents is None or self.loading is not None:
            return False
        wanted, differs = contents.array(), contents.array() != self.actual_contents
        if not differs.any():
            if self.record.state is not RankState.READY:
                self.write_record(state=RankState.READY)
            return False
        expert_map = self._harness.expert_map
        if expert_map is not None and expert_map.has(self.member):
            in_use = differs & (expert_map.placement[:, self.member.rank] >= 0)
            if in_use.any() and contents.epoch != expert_map.epoch:
                return False
        self.actual_contents = np.where(differs, LOADING, self.actual_contents).astype(np.int16)
        self.loading = wanted
        return True

    def finish_load(self) -> None:
        if self.loading is None:
            return
        self.actual_contents, self.loading = self.loading, None
        self.write_residents()
        self.begin_load()

    def write_residents(self) -> None:
        contents = SlotContents.of(self.member, self.actual_contents)
        self._put(self._harness.keys.resident(*self._ids), pack_record(contents))

    def _assignment(self) -> SlotContents | None:
        found = self._harness.etcd.values.get(self._harness.keys.assignment(*self._ids))
        return unpack_record(found.value, SlotContents) if found else None

    def _put(self, key: str, value: bytes) -> None:
        self._harness.etcd.apply([Put(key=key, value=value, lease_id=self.lease_id)])

    @property
    def _ids(self) -> tuple[RankId, Incarnation]:
        return self.member.rank, self.member.incarnation


class ControlPlaneHarness:
    def __init__(self, instance: InstanceSpec | None = None) -> None:
        self.spec = instance or spec()
        self.clock = FakeClock()
        self.etcd = MemoryEtcd(self.clock)
        self.keys = Keys("harness")
        self.ranks: dict[int, Rank] = {}
        self.incarnations: dict[int, int] = {}
        self.published: list[ExpertMap] = []
        self.writes: list[Write] = []
        self.plans: list[PlanHeal] = []
        self.removed_members: set[Member] = set()
        self.stops_stepping = False
        self._publisher = Publisher(self.etcd.client(), self.keys, self.clock)
        self.etcd.apply([Put(key=self.keys.spec, value=pack_record(self.spec))])
        self.begin_term()

    @property
    def expert_map(self) -> ExpertMap | None:
        found = self.etcd.values.get(self.keys.map)
        return unpack_map(found.value) if found else None

    # The control plane.

    def begin_term(self) -> None:
        """A new leader, with nothing but what etcd holds."""
        record = LeaderRecord(control_plane="cp", pid=1, term=1, since=0.0)
        self.leader_revision = self.etcd.apply(
            [Put(key=self.keys.leader, value=pack_record(record))]
        )
        self.cluster = StateApplier(self.keys)
        self.watch = self.etcd.open_watch(self.keys.root)
        first = self.watch.items.popleft()
        assert isinstance(first, Snapshot)
        self.cluster.apply(first)
        self.leader_term = LeaderTerm(
            self.cluster.state, POLICY, DetectorTimings(), self.clock.now()
        )
        for rank in self.ranks.values():
            self._connect(rank)

    def pass_time(self, seconds: float, *, tick_s: float = 0.02) -> None:
        for _ in range(max(1, round(seconds / tick_s))):
            self.clock.advance(tick_s)
            for rank in self.ranks.values():
                if rank.answering:
                    self.etcd.keep_alive(rank.lease_id)
            self.etcd.expire()
            self.run()

    def run(self, *, reply_lost: bool = False) -> None:
        """Events, Pongs, a tick, and writes until there is none."""
        for _ in range(50):
            write = self.next_decision()
            if write is None:
                return
            if isinstance(write, PlanHeal):
                self.plans.append(write)
                plan, now = write.compute(), self.clock.now()
                self.leader_term.membership.on_heal_planned(write, plan, now)
                self.clock.advance(0.06)
                continue
            self.perform(write, self.leader_revision, reply_lost=reply_lost)
        raise AssertionError("the control plane writes without end")

    def next_decision(self) -> Decision | None:
        """After all events, a Pong of each rank that answers, and a tick."""
        now = self.clock.now()
        self._deliver()
        for rank in self.ranks.values():
            if rank.answering and rank.registered:
                if rank.step_ms and not self.stops_stepping:
                    rank.step = Step(rank.step + 1)
                pong = self._pong(rank)
                self.leader_term.on_probe(ProbePong(member=rank.member, pong=pong), now)
        self.leader_term.on_tick(self.cluster.state, now)
        return self.decide()

    async def publish(self, write: Write) -> None:
        """As the driver does it, with all that the transaction compares. Raises TxnConflict."""
        await self._publisher.grant_verdict_lease()
        await self._publisher.write(write, self.leader_revision, self.cluster.state)

    def reread(self) -> None:
        """As the driver does after a write that failed."""
        for change in self.cluster.apply(self.etcd.snapshot(self.keys.root)):
            self._on_change(change)

    def perform(self, write: Write, leader_revision: int, *, reply_lost: bool = False) -> None:
        """One fenced transaction, its effect checked, and told to the leader as the driver does."""
        compare = [Compare(key=self.keys.leader, mod_revision=leader_revision)]
        if isinstance(write, PublishDesired):
            revision = self.cluster.state.revision_of(self.keys.desired)
            compare.append(Compare(key=self.keys.desired, mod_revision=revision))
        elif not isinstance(write, DeleteKeys):
            revision = self.cluster.state.revision_of(self.keys.map)
            compare.append(Compare(key=self.keys.map, mod_revision=revision))
        operations = self._publisher._operations(write)
        before = self.expert_map or self.cluster.state.expert_map  # etcd may have lost it
        self.etcd.check(compare)
        revision = self.etcd.apply(operations)
        self.writes.append(write)
        if isinstance(write, PublishMap):
            self._check_map(write, before)
        if isinstance(write, Assign | DeclareDead):
            self._check_verdicts(write, before)
        if reply_lost:
            self.reread()
            return
        for operation in operations:
            value = operation.value if isinstance(operation, Put) else None
            event = WatchEvent(key=operation.key, value=value, mod_revision=revision)
            for change in self.cluster.apply(event):
                self._on_change(change)

    def perform_expecting_conflict(self, write: Write, leader_revision: int) -> bool:
        try:
            self.perform(write, leader_revision)
        except TxnConflict:
            return True
        return False

    def decide(self) -> Decision | None:
        return self.leader_term.decide(
            self.cluster.state, self.clock.now(), unix_now=self.clock.wall()
        )

    def ask(self, change: Change) -> None:
        """As the driver does it. Fails if it is refused."""
        self._deliver()
        asked = change_desired(self.cluster.state, change, self.clock.wall())
        assert isinstance(asked, DesiredState), asked
        self.perform(PublishDesired(desired=asked, cause="asked"), self.leader_revision)

    def _on_change(self, change: StateChange) -> None:
        self.leader_term.on_change(change, self.cluster.state, self.clock.now())

    def _deliver(self) -> None:
        while self.watch.items:
            item = self.watch.items.popleft()
            assert item is not None
            for change in self.cluster.apply(item):
                self._on_change(change)

    def _check_verdicts(self, write: Assign | DeclareDead, before: ExpertMap | None) -> None:
        """They name the map to come; and nothing of the dead is given away before they stand."""
        epoch = before.epoch if before else 0
        assert all(v.epoch == epoch + 1 for v in write.verdicts)
        dead = self.leader_term.membership.dead_in_map(self.cluster.state)
        assert all(self.keys.verdict(m.rank, m.incarnation) in self.etcd.values for m in dead)

    def _check_map(self, write: PublishMap, before: ExpertMap | None) -> None:
        published = write.expert_map
        assert published.uncovered() == [], "a published map leaves experts without a slot"
        if before is not None:
            assert published.epoch == before.epoch + 1
        else:  # the first one, or the leader is new and etcd has lost the others
            assert published.epoch > max((each.epoch for each in self.published), default=0)
        for member in published.members:
            rank = self._rank_of(member)
            row = published.placement[:, member.rank]
            named = row >= 0
            if rank is not None:
                assert (rank.actual_contents[named] == row[named]).all(), (
                    "a named expert is not resident"
                )
        left = set(before.members if before else ()) - set(published.members)
        verdicts = {v.member for v in write.verdicts}
        assert left == verdicts, "exactly those with a verdict leave"
        assert all(v.epoch == published.epoch for v in write.verdicts)
        assert not self.removed_members & set(published.members), "a dead incarnation is back"
        self._check_joiners(published, before)
        if before is not None and write.verdicts:
            self._check_nothing_moved(before, published)
        self.removed_members |= left
        self.published.append(published)

    def _check_joiners(self, published: ExpertMap, before: ExpertMap | None) -> None:
        """Who is new; and of those that were new before, nobody who may still be unknown."""
        new = {m.rank for m in published.members if before is None or not before.has(m)}
        listed = set(published.joiners)
        assert new <= listed <= {m.rank for m in published.members}
        assert listed - new <= set(before.joiners if before else ())
        if before is None:
            return
        alive = [r for r in map(self._rank_of, before.members) if r is not None]
        if any(self._adopted_by(r) < before.epoch for r in alive):
            stayed = {m.rank for m in published.members if before.has(m)}
            assert set(before.joiners) & stayed <= listed, "a joiner counts as proven and is not"

    def _check_nothing_moved(self, before: ExpertMap, published: ExpertMap) -> None:
        """A survivor's replica stays, unless its slot was given to an orphan by an assignment."""
        for member in set(before.members) & set(published.members):
            old, new = (m.placement[:, member.rank] for m in (before, published))
            assigned = self.cluster.state.assignments.get(member)
            given = old != assigned.array() if assigned else np.zeros(old.shape, dtype=bool)
            assert ((old == new) | (old < 0) | given).all(), "a death moved a survivor's replica"

    # The ranks.

    def start(self, rank_id: int) -> Rank:
        """The next life of a rank whose last one is over."""
        assert rank_id not in self.ranks
        self.incarnations[rank_id] = self.incarnations.get(rank_id, 0) + 1
        member = Member(rank=RankId(rank_id), incarnation=Incarnation(self.incarnations[rank_id]))
        rank = self.ranks[rank_id] = Rank(self, member)
        rank.write_record()
        self._connect(rank)
        self.link()
        return rank

    def link(self) -> None:
        """Every answering rank opens links to every other."""
        up = [r for r in self.ranks.values() if r.answering]
        for rank in up:
            links = tuple(sorted(r.member for r in up if r is not rank))
            if rank.record.links != links:
                rank.write_record(links=links)

    def rejoin(self, rank_id: int) -> Rank:
        """The process was fenced, and goes on in place with what its slots hold."""
        fenced = self.ranks.pop(rank_id)
        self.etcd.revoke(fenced.lease_id)
        rank = self.start(rank_id)
        rank.write_record(first_incarnation=fenced.record.first_incarnation)
        rank.actual_contents = fenced.actual_contents
        rank.write_residents()
        return rank

    def kill(self, rank_id: int, *, agent: bool = True) -> None:
        rank = self.ranks.pop(rank_id)
        self.leader_term.on_probe(ProbeRefused(member=rank.member), self.clock.now())
        if agent:
            self.etcd.revoke(rank.lease_id)

    def hang(self, rank_id: int) -> None:
        """It is suspected by a peer, as it would be under load."""
        rank = self.ranks[rank_id]
        rank.answering = False
        suspicion = Suspicion(
            rank=rank.member.rank,
            incarnation=rank.member.incarnation,
            by="a peer",
            reason=SuspicionReason.EXCHANGE,
            epoch=Epoch(1),
            step=Step(0),
            raised_at=self.clock.now(),
        )
        key = self.keys.suspicion(
            rank.member.rank, rank.member.incarnation, Accuser.RANK, suspicion.by
        )
        self.etcd.apply([Put(key=key, value=pack_record(suspicion))])

    def lag(self, rank_id: int) -> None:
        """Later maps do not reach its engine until `lagging_epoch` is None again."""
        self.ranks[rank_id].lagging_epoch = self._adopted_by(self.ranks[rank_id])

    def load_all(self) -> None:
        for rank in self.ranks.values():
            if rank.answering:
                rank.begin_load()
                rank.finish_load()

    def settle(self, seconds: float = 6.0) -> None:
        for _ in range(round(seconds / 0.2)):
            self.load_all()
            self.link()
            self.pass_time(0.2, tick_s=0.05)

    def _connect(self, rank: Rank) -> None:
        if rank.answering:
            self.leader_term.on_probe(ProbeConnected(member=rank.member), self.clock.now())

    def _rank_of(self, member: Member) -> Rank | None:
        rank = self.ranks.get(member.rank)
        return rank if rank is not None and rank.member == member else None

    def _adopted_by(self, rank: Rank) -> Epoch:
        if rank.lagging_epoch is not None:
            return rank.lagging_epoch
        return self.published[-1].epoch if self.published else Epoch(0)

    def _pong(self, rank: Rank) -> Pong:
        return Pong(
            nonce=1,
            rank=rank.member.rank,
            incarnation=rank.member.incarnation,
            epoch=self._adopted_by(rank),
            step=rank.step,
            engine_age_ms=0.0,
            waiting_for=(),
            load=replace(
                LOAD, running=rank.sessions, step_ms=rank.step_ms, late_peers=rank.late_peers
            ),
            out_of_step=rank.out_of_step,
        )
