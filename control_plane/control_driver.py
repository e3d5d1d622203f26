"""The control plane's event loop: etcd changes and probe results in, writes to etcd out. It decides
nothing itself: `leader_term` judges and plans, `election` says whether it may act."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from dataclasses import dataclass

import structlog

from control_plane.cluster_state import ClusterState
from control_plane.control_reporter import ControlReporter
from control_plane.desired_changes import Change, Refusal, change_desired
from control_plane.detector_timings import DetectorTimings
from control_plane.election import Election, ElectionState
from control_plane.healing import RebalanceProgress
from control_plane.leader_term import LeaderTerm
from control_plane.leadership import Leadership
from control_plane.membership import MembershipPolicy
from control_plane.placement import HealPlan
from control_plane.placement.topology import Floats
from control_plane.probe_events import ProbeEvent
from control_plane.probe_targets import ProbeTargets
from control_plane.prober import Prober
from control_plane.publisher import Publisher
from control_plane.rank_loads import RankLoads
from control_plane.spec_publisher import publish_spec
from control_plane.state_applier import (
    LeaderDeleted,
    LeaderPut,
    MalformedValue,
    RankRefused,
    StateApplier,
    StateChange,
)
from control_plane.suspicion_publisher import SuspicionPublisher
from control_plane.telemetry import Metrics
from control_plane.writes import PlanHeal, PublishDesired, PublishMap, Write
from shared.clock import Clock
from shared.desired_state import DesiredState
from shared.errors import StoreError, StoreUnavailable, TxnConflict, Unavailable
from shared.handshake import Access
from shared.keys import Keys
from shared.records import InstanceSpec
from shared.store import Snapshot, Store, WatchEvent
from shared.types import Member
from shared.wire import Load

log = structlog.get_logger()

_INBOX_MAX = 4096
_TICK_S = 0.1
_OFFER_AFTER_S = 0.25
_OFFER_INTERVAL_S = 0.05
_CHANGE_TRIES_MAX = 20
_CHANGE_RETRY_S = (0.02, 0.1)
_TICK_URGENT_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A write has ended. `outcome` is what etcd holds now; `error` says why the write failed."""

    write: Write
    outcome: tuple[WatchEvent, ...] | Snapshot
    error: StoreError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The next step of a heal, for the leader term that asked for it."""

    leader_term: LeaderTerm
    request: PlanHeal
    plan: HealPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteDelayed:
    """A write has not ended after _OFFER_AFTER_S: etcd may be away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElectionChanged:
    """The election state may have changed."""


Event = Snapshot | WatchEvent | ProbeEvent | Written | Planned | WriteDelayed | ElectionChanged


class Driver:
    """One process's control plane, active or on standby."""

    def __init__(
        self,
        *,
        store: Store,
        keys: Keys,
        clock: Clock,
        name: str,
        access: Access,
        spec: InstanceSpec,
        policy: MembershipPolicy,
        timings: DetectorTimings,
        leader_ttl_s: float,
        probe_interval_s: float,
        urgent_probe_interval_s: float,
        counts_interval_s: float,
        metrics: Metrics,
        admin_url: str = "",
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._spec = spec
        self._policy = policy
        self._timings = timings
        self._reporter = ControlReporter(metrics)
        self._cluster = StateApplier(keys)
        self._inbox: asyncio.Queue[Event] = asyncio.Queue(_INBOX_MAX)
        self._election = Election(name=name, ttl_s=leader_ttl_s)
        self._leadership = Leadership(
            store=store,
            cluster=self._cluster,
            election=self._election,
            clock=clock,
            name=name,
            pid=os.getpid(),
            host=socket.gethostname(),
            ttl_s=leader_ttl_s,
            on_change=self._notify_election_changed,
            admin_url=admin_url,
        )
        self._prober = Prober(
            name=name,
            access=access,
            report=self._inbox.put,
            interval_s=probe_interval_s,
            urgent_interval_s=urgent_probe_interval_s,
            counts_interval_s=counts_interval_s,
        )
        self._publisher = Publisher(store, keys, clock)
        self._suspicions = SuspicionPublisher(store, keys, lease_ttl_s=leader_ttl_s)
        self._leader_term: LeaderTerm | None = None
        self._write_under_way = False
        self._write_delayed = False
        self._spec_published = False
        self._next_offer_at = 0.0
        self._probe_targets = ProbeTargets()
        self._rank_loads = RankLoads()

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop` is set, then gives up the leader key. Raises ConfigError if the
        instance serves something else."""
        async with asyncio.TaskGroup() as group:
            work = group.create_task(self._work())
            await stop.wait()
            work.cancel()
        await self._leadership.resign()

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            group.create_task(self._leadership.run())
            group.create_task(self._prober.run())
            group.create_task(self._publisher.run())
            group.create_task(self._suspicions.run())
            group.create_task(self._loop(group))

    @property
    def state(self) -> ClusterState:
        """What etcd holds, as far as this process has heard. Never edited."""
        return self._cluster.state

    @property
    def leads(self) -> bool:
        return self._election.may_act(self._clock.now())

    @property
    def frozen(self) -> bool:
        """Whether the leader holds verdicts back because most leases have expired at once."""
        return self._leader_term is not None and self._leader_term.detector.frozen

    @property
    def rebalance(self) -> RebalanceProgress:
        """As far as this process knows: nothing if it does not lead."""
        term = self._leader_term
        return RebalanceProgress() if term is None else term.membership.rebalance

    def load_of(self, member: Member) -> Load | None:
        """Its newest, if this process leads and has probed it."""
        return self._rank_loads.of(member)

    def expert_loads(self) -> Floats | None:
        """[num_layers, num_experts], what tokens have chosen lately. None if it is not known: too
        few have come, or this process does not lead."""
        meter = self._leader_term.membership.rebalancer.meter if self._leader_term else None
        return None if meter is None else meter.loads(self._clock.now())

    async def change(
        self, change: Change, *, request_id: str = "", digest: str = ""
    ) -> DesiredState | Refusal:
        """Puts a change on purpose into the desired state, or refuses it before anything moves.
        The same `request_id` again changes nothing, with another `digest` it is refused. Raises
        Unavailable if this process does not lead, and StoreUnavailable if etcd did not answer: ask
        again then, with the same id."""
        for _ in range(_CHANGE_TRIES_MAX):
            state, election = self._cluster.state, self._election
            if not (state.synced and self.leads):
                raise Unavailable("this control plane does not lead; ask the one that does")
            desired = change_desired(
                state, change, self._clock.wall(), request_id=request_id, digest=digest
            )
            if isinstance(desired, Refusal) or desired == state.desired:
                return desired
            write = PublishDesired(desired=desired, cause=type(change).__name__)
            try:
                events = await self._publisher.write(write, election.leader_revision, state)
            except TxnConflict:
                await asyncio.sleep(random.uniform(*_CHANGE_RETRY_S))  # the watch brings the news
                continue
            for event in events:
                await self._inbox.put(event)
            log.info("change_asked", change=desired.change, what=repr(change))
            return desired
        raise StoreUnavailable("the desired state kept changing; ask again")

    def health(self) -> dict[str, object]:
        expert_map, leader = self._cluster.state.expert_map, self._cluster.state.leader
        return {
            "synced": self._cluster.state.synced,
            "leading": self._election.may_act(self._clock.now()),
            "leader": leader.control_plane if leader else None,
            "term": self._cluster.state.term,
            "epoch": expert_map.epoch if expert_map else 0,
            "members": [str(m) for m in expert_map.members] if expert_map else [],
            "frozen": self.frozen,
        }

    async def _watch(self) -> None:
        async for item in self._store.watch(self._keys.root):
            await self._inbox.put(item)

    def _notify_election_changed(self) -> None:
        if not self._inbox.full():
            self._inbox.put_nowait(ElectionChanged())

    async def _loop(self, group: asyncio.TaskGroup) -> None:
        while True:
            for event in await self._next_events():
                self._handle_event(event)
            now = self._clock.now()
            self._leadership.look_at_doubts()
            await self._begin_or_end_term(now)
            if self._leader_term is not None:
                self._leader_term.on_tick(self._cluster.state, now)
                self._reporter.report_judgements(self._leader_term.take_judgements())
                self._act(group, self._leader_term, now)
            self._reporter.update_gauges(self._cluster.state, self._leader_term, now)

    async def _next_events(self) -> list[Event]:
        urgent = self._leader_term is not None and self._leader_term.detector.urgent
        events: list[Event] = []
        try:
            tick_s = _TICK_URGENT_S if urgent else _TICK_S
            async with asyncio.timeout(tick_s):
                events.append(await self._inbox.get())
        except TimeoutError:
            return events
        while not self._inbox.empty():
            events.append(self._inbox.get_nowait())
        return events

    def _handle_event(self, event: Event) -> None:
        now = self._clock.now()
        match event:
            case Snapshot() | WatchEvent():
                self._handle_changes(self._cluster.apply(event), now)
                if isinstance(event, Snapshot):
                    self._leadership.notify()
            case Written():
                self._write_under_way = self._write_delayed = False
                self._handle_written(event, now)
            case Planned():
                event.leader_term.membership.on_heal_planned(event.request, event.plan, now)
                self._reporter.report_plan(event.plan)
            case WriteDelayed():
                self._write_delayed = self._write_under_way
            case ElectionChanged():
                pass
            case _:
                self._rank_loads.on_probe(event)
                if self._leader_term is not None:
                    self._leader_term.on_probe(event, now)

    def _handle_written(self, written: Written, now: float) -> None:
        outcome = written.outcome
        for item in (outcome,) if isinstance(outcome, Snapshot) else outcome:
            self._handle_changes(self._cluster.apply(item), now)
        self._reporter.report_write(written.write, written.error, self._cluster.state, now)

    def _handle_changes(self, changes: list[StateChange], now: float) -> None:
        for change in changes:
            if isinstance(change, MalformedValue):
                log.error("malformed_value", key=change.key, error=change.error)
            if isinstance(change, RankRefused):
                self._reporter.report_refused(change.record)
            self._probe_targets.on_change(change, self._cluster.state)
            self._rank_loads.on_change(change)
            if self._leader_term is not None:
                self._leader_term.on_change(change, self._cluster.state, now)
            if isinstance(change, LeaderPut | LeaderDeleted):
                self._leadership.notify()

    async def _begin_or_end_term(self, now: float) -> None:
        """A leader term lasts as long as the election lets this process act. If its lease could not
        be renewed in time, it lasts as long as the leader key was not seen to go and most members
        follow it: then it only offers maps."""
        if not self._election.may_act(now) and not self._holds_out(now):
            if self._leader_term is not None:
                log.warning("leadership_ended", leader=self._cluster.state.leader)
                self._leader_term, self._spec_published = None, False
                self._suspicions.update((), now)
                self._prober.watch(())
                self._rank_loads.clear()
            return
        if self._leader_term is None:
            log.info("leadership_won", term=self._cluster.state.term)
            self._leader_term = LeaderTerm(self._cluster.state, self._policy, self._timings, now)
        if not self._spec_published:
            self._spec_published = await publish_spec(
                self._store, self._cluster, self._spec, self._election.leader_revision
            )

    def _act(self, group: asyncio.TaskGroup, leader_term: LeaderTerm, now: float) -> None:
        dead = leader_term.membership.dead
        self._prober.watch(self._probe_targets.records(self._cluster.state, dead))
        self._prober.set_urgent(leader_term.detector.urgent)
        self._suspicions.update(leader_term.detector.doubts, now)
        if self._write_delayed or not self._election.may_act(now):
            self._offer_map(leader_term, now)
        self._repeat_map(leader_term, now)
        if self._write_under_way or not self._spec_published or not self._election.may_act(now):
            return
        decision = leader_term.decide(self._cluster.state, now, unix_now=self._clock.wall())
        if isinstance(decision, PlanHeal):
            group.create_task(self._plan(leader_term, decision))
        elif decision is not None:
            self._write_under_way = True
            if isinstance(decision, PublishMap):
                leader_term.membership.on_publishing(decision.expert_map.epoch)
            group.create_task(self._write(decision, self._election.leader_revision))

    def _holds_out(self, now: float) -> bool:
        expert_map = self._cluster.state.expert_map
        return (
            self._leader_term is not None
            and expert_map is not None
            and self._election.state is ElectionState.LEADING
            and self._leader_term.offers.has_majority(expert_map, now)
        )

    def _offer_map(self, leader_term: LeaderTerm, now: float) -> None:
        """etcd has the map later: until then it is kept as one that etcd has lost."""
        if now < self._next_offer_at:
            return
        offered = leader_term.map_to_offer(self._cluster.state, now)
        if offered is None:
            return
        self._next_offer_at = now + _OFFER_INTERVAL_S
        expert_map = offered.expert_map
        self._prober.offer_map(expert_map)
        known = self._cluster.state.expert_map
        if known is None or expert_map.epoch > known.epoch:
            self._handle_changes(self._cluster.keep_map(expert_map), now)
            self._reporter.report_offer(offered)

    def _repeat_map(self, leader_term: LeaderTerm, now: float) -> None:
        """Ranks that are cut off from etcd alone hear of a stored map from here."""
        unread = leader_term.map_to_repeat(self._cluster.state, now)
        if unread is not None:
            log.info("map_repeated", epoch=unread.epoch)
            self._prober.offer_map(unread)

    async def _plan(self, leader_term: LeaderTerm, request: PlanHeal) -> None:
        plan = await asyncio.to_thread(request.compute)
        await self._inbox.put(Planned(leader_term=leader_term, request=request, plan=plan))

    async def _write(self, write: Write, leader_revision: int) -> None:
        loop = asyncio.get_running_loop()
        delayed = loop.call_later(_OFFER_AFTER_S, self._notify_delayed)
        try:
            events = await self._publisher.write(write, leader_revision, self._cluster.state)
            written = Written(write=write, outcome=events, error=None)
        except StoreError as error:
            if isinstance(error, StoreUnavailable):
                self._notify_delayed()
            snapshot = await self._publisher.reread()
            written = Written(write=write, outcome=snapshot, error=error)
        finally:
            delayed.cancel()
        await self._inbox.put(written)

    def _notify_delayed(self) -> None:
        if not self._inbox.full():
            self._inbox.put_nowait(WriteDelayed())
