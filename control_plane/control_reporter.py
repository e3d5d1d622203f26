"""What the control plane logs and counts about its own decisions. It changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import structlog

from control_plane.cluster_state import ClusterState
from control_plane.judgements import BadCounts, Judgement, Standstill, VerdictCancelled
from control_plane.leader_term import LeaderTerm
from control_plane.placement import HealPlan, advise, compute_fault_tolerance, describe
from control_plane.telemetry import Metrics
from control_plane.writes import Assign, DeclareDead, PublishDesired, PublishMap, Write
from shared.errors import StoreError
from shared.expert_map import ExpertMap
from shared.records import RankRecord, Verdict
from shared.release import refusal
from shared.types import Member, RankId, SuspicionReason

log = structlog.get_logger()

LOADS_INTERVAL_S = 2.0
"""Between two updates of what is shown of experts' loads."""


class ControlReporter:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._loads_updated_at = -LOADS_INTERVAL_S
        self._refused: dict[RankId, Member] = {}  # those logged last

    def report_judgements(self, judgements: Iterable[Judgement]) -> None:
        for item in judgements:
            if isinstance(item, Verdict):
                self._report_verdict(item)
            elif isinstance(item, Standstill):
                self._metrics.standstills.inc()
                log.warning("standstill")
            elif isinstance(item, VerdictCancelled):
                self._metrics.verdicts_cancelled.inc()
                log.warning("verdict_cancelled", member=str(item.member), detail="it goes on")
            elif isinstance(item, BadCounts):
                log.warning("expert_counts_refused", detail=item.detail)
            else:
                self._metrics.alarms.labels(item.kind.value).inc()
                log.error("alarm", kind=item.kind.value, detail=item.detail)

    def report_refused(self, record: RankRecord) -> None:
        """It may write its record many times."""
        if record.member != self._refused.get(record.rank):
            detail = refusal("this control plane", f"rank {record.member}", record.release)
            log.error("rank_refused", member=str(record.member), detail=detail)
        self._refused[record.rank] = record.member

    def report_offer(self, offered: PublishMap) -> None:
        """The ranks have got a map that etcd does not hold yet."""
        expert_map = offered.expert_map
        log.warning(
            "map_offered",
            epoch=expert_map.epoch,
            members=[str(m) for m in expert_map.members],
            cause=expert_map.cause,
            detail="etcd cannot be written; it gets the map when it is back",
        )

    def report_write(
        self, write: Write, error: StoreError | None, state: ClusterState, now: float
    ) -> None:
        """After etcd answered, or failed to. `now` is the control plane's `Clock.now()`."""
        if error is not None:
            self._metrics.failed_writes.inc()
            log.warning("write_failed", error=str(error))
        elif isinstance(write, DeclareDead | Assign) and write.verdicts:
            declared_dead = [str(v.member) for v in write.verdicts]
            log.warning("declared_dead_without_map", members=declared_dead)
        elif isinstance(write, PublishMap):
            expert_map = write.expert_map
            self._metrics.publish_s.observe(now - expert_map.published_at)
            self._metrics.count_map(expert_map.cause)
            for verdict in write.verdicts:
                self._metrics.recovery_s.labels("publish").observe(now - verdict.decided_at)
            log.info(
                "map_published",
                epoch=expert_map.epoch,
                members=[str(m) for m in expert_map.members],
                cause=expert_map.cause,
                publish_ms=round((now - expert_map.published_at) * 1000, 1),
            )
            drained = [v for v in write.verdicts if v.cause is SuspicionReason.DRAINED]
            for verdict in drained:
                self._metrics.verdicts.labels(verdict.cause.value).inc()
                log.info("rank_left", rank=verdict.rank, incarnation=verdict.incarnation)
            if len(drained) == len(write.verdicts):  # after a death there is more urgent work
                self._report_fault_tolerance(expert_map, state)
        elif isinstance(write, PublishDesired):
            log.info("desired_state_changed", change=write.desired.change, cause=write.cause)

    def report_plan(self, plan: HealPlan) -> None:
        if plan.takes_candidate:
            self._metrics.rebalances.inc()
            before, after = plan.slowness
            log.info("rebalance_begun", imbalance=round(before, 3), foreseen=round(after, 3))

    def update_gauges(
        self, state: ClusterState, leader_term: LeaderTerm | None, now: float
    ) -> None:
        expert_map = state.expert_map
        self._metrics.epoch.set(expert_map.epoch if expert_map else 0)
        self._metrics.members.set(len(expert_map.members) if expert_map else 0)
        self._metrics.ranks_wanted.set(state.spec.num_ranks if state.spec else 0)
        self._metrics.ranks_registered.set(len({m.rank for m in state.records}))
        self._metrics.term.set(state.term)
        self._metrics.synced.set(state.synced)
        self._metrics.leader.set(leader_term is not None)
        self._metrics.suspected.set(len(leader_term.detector.suspected) if leader_term else 0)
        self._metrics.frozen.set(leader_term is not None and leader_term.detector.frozen)
        dead = leader_term.membership.dead_in_map(state) if leader_term else ()
        self._metrics.dead_members.set(len(dead))
        self._metrics.tolerance.on_state(expert_map, state.records)
        if leader_term is not None and now - self._loads_updated_at >= LOADS_INTERVAL_S:
            self._loads_updated_at = now
            self._update_loads(expert_map, leader_term, now)

    def _update_loads(
        self, expert_map: ExpertMap | None, leader_term: LeaderTerm, now: float
    ) -> None:
        if expert_map is None:
            return
        counts = expert_map.replica_counts()
        metrics, meter = self._metrics, leader_term.membership.rebalancer.meter
        for name, value in (("min", counts.min()), ("mean", counts.mean()), ("max", counts.max())):
            metrics.expert_replicas.labels(name).set(value)
        loads = {} if meter is None else meter.rank_loads(now)
        members = [m for m in expert_map.members if m in loads]
        if not members:
            return
        load_RL = np.stack([loads[m] for m in members])
        mean_L = load_RL.mean(axis=0)
        if not mean_L.all():
            return
        imbalance_L = load_RL.max(axis=0) / mean_L
        metrics.layer_imbalance.labels("median").set(np.median(imbalance_L))
        metrics.layer_imbalance.labels("worst").set(imbalance_L.max())
        metrics.rank_load.clear()  # of those who have left
        share_R = load_RL.sum(axis=1) / mean_L.sum()
        for member, share in zip(members, share_R, strict=True):
            metrics.rank_load.labels(str(member.rank)).set(share)

    def _report_verdict(self, verdict: Verdict) -> None:
        took_s = verdict.decided_at - verdict.first_signal_at
        self._metrics.verdicts.labels(verdict.cause.value).inc()
        self._metrics.recovery_s.labels("verdict").observe(took_s)
        log.warning(
            "rank_declared_dead",
            rank=verdict.rank,
            incarnation=verdict.incarnation,
            cause=verdict.cause.value,
            signals=[f"{s.by}:{s.reason.value}" for s in verdict.signals],
            verdict_ms=round(took_s * 1000, 1),
        )

    def _report_fault_tolerance(self, expert_map: ExpertMap, state: ClusterState) -> None:
        records = state.records
        if any(m not in records for m in expert_map.members):
            return
        nodes = {m.rank: records[m].node for m in expert_map.members}
        tolerance = compute_fault_tolerance(expert_map, nodes)
        log.info("fault_tolerance", text=describe(tolerance, advise(expert_map, nodes)))
