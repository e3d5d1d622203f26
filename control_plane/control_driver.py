"""The control plane's event loop: etcd changes and probe results in, writes to etcd out. It decides
nothing itself: `leader_term` judges and plans, `election` says whether it may act."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass

import structlog

from control_plane.control_reporter import ControlReporter
from control_plane.detector_timings import DetectorTimings
from control_plane.election import Election
from control_plane.leader_term import LeaderTerm
from control_plane.leadership import Leadership
from control_plane.membership import MembershipPolicy
from control_plane.placement import HealPlan
from control_plane.probe_events import ProbeEvent
from control_plane.probe_targets import ProbeTargets
from control_plane.prober import Prober
from control_plane.publisher import Publisher
from control_plane.spec_publisher import publish_spec
from control_plane.state_applier import (
    LeaderDeleted,
    LeaderPut,
    MalformedValue,
    StateApplier,
    StateChange,
)
from control_plane.suspicion_publisher import SuspicionPublisher
from control_plane.telemetry import Metrics
from control_plane.writes import PlanHeal, Write
from shared.clock import Clock
from shared.errors import StoreError
from shared.handshake import Access
from shared.keys import Keys
from shared.records import InstanceSpec
from shared.store import Snapshot, Store, WatchEvent

log = structlog.get_logger()

_INBOX_MAX = 4096
_TICK_S = 0.1
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
class ElectionChanged:
    """The election state may have changed."""


Event = Snapshot | WatchEvent | ProbeEvent | Written | Planned | ElectionChanged


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
        self._spec_published = False
        self._probe_targets = ProbeTargets()

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

    def health(self) -> dict[str, object]:
        expert_map, leader = self._cluster.state.expert_map, self._cluster.state.leader
        return {
            "synced": self._cluster.state.synced,
            "leading": self._election.may_act(self._clock.now()),
            "leader": leader.control_plane if leader else None,
            "term": self._cluster.state.term,
            "epoch": expert_map.epoch if expert_map else 0,
            "members": [str(m) for m in expert_map.members] if expert_map else [],
            "frozen": self._leader_term.detector.frozen if self._leader_term else False,
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
                self._write_under_way = False
                self._handle_written(event, now)
            case Planned():
                event.leader_term.membership.on_heal_planned(event.request, event.plan, now)
                self._reporter.report_plan(event.plan)
            case ElectionChanged():
                pass
            case _:
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
            self._probe_targets.on_change(change, self._cluster.state)
            if self._leader_term is not None:
                self._leader_term.on_change(change, self._cluster.state, now)
            if isinstance(change, LeaderPut | LeaderDeleted):
                self._leadership.notify()

    async def _begin_or_end_term(self, now: float) -> None:
        """A leader term lasts exactly as long as the election lets this process act."""
        if not self._election.may_act(now):
            if self._leader_term is not None:
                log.warning("leadership_ended", leader=self._cluster.state.leader)
                self._leader_term, self._spec_published = None, False
                self._suspicions.update((), now)
                self._prober.watch(())
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
        if self._write_under_way or not self._spec_published:
            return
        decision = leader_term.decide(self._cluster.state, now)
        if isinstance(decision, PlanHeal):
            group.create_task(self._plan(leader_term, decision))
        elif decision is not None:
            self._write_under_way = True
            group.create_task(self._write(decision, self._election.leader_revision))

    async def _plan(self, leader_term: LeaderTerm, request: PlanHeal) -> None:
        plan = await asyncio.to_thread(request.compute)
        await self._inbox.put(Planned(leader_term=leader_term, request=request, plan=plan))

    async def _write(self, write: Write, leader_revision: int) -> None:
        try:
            events = await self._publisher.write(write, leader_revision, self._cluster.state)
            written = Written(write=write, outcome=events, error=None)
        except StoreError as error:
            snapshot = await self._publisher.reread()
            written = Written(write=write, outcome=snapshot, error=error)
        await self._inbox.put(written)
