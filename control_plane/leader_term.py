"""One leader's term: passes the failure detector's judgements to membership. Pure. Every won
election makes a new one from the cluster state."""

from __future__ import annotations

from control_plane.cluster_state import ClusterState
from control_plane.detector_timings import DetectorTimings
from control_plane.failure_detector import FailureDetector
from control_plane.judgements import (
    Alarm,
    BadCounts,
    Judgement,
    Standstill,
    VerdictCancelled,
    verdicts_on,
)
from control_plane.map_offers import MapOffers
from control_plane.membership import Membership, MembershipPolicy
from control_plane.probe_events import (
    ProbeBroken,
    ProbeConnected,
    ProbeCounts,
    ProbeEvent,
    ProbePong,
    ProbeRefused,
)
from control_plane.state_applier import (
    DesiredPut,
    MapPut,
    RecordDeleted,
    RecordPut,
    StateChange,
    SuspicionRaised,
    VerdictPut,
    ViewPut,
)
from control_plane.writes import Decision, PublishMap
from shared.expert_map import ExpertMap
from shared.records import ProcessView, Verdict
from shared.types import Epoch, Member, ProcessState, SuspicionReason

_RECHECK_S = 0.05


class LeaderTerm:
    """Takes changes of the cluster state and probe events, and returns the next write."""

    def __init__(
        self, state: ClusterState, policy: MembershipPolicy, timings: DetectorTimings, now: float
    ) -> None:
        self.detector = FailureDetector(timings, now)
        self.membership = Membership(policy, first_epoch=Epoch(state.first_epoch))
        self.offers = MapOffers(state.first_epoch)
        self.detector.set_paused(state.desired.verdicts_paused)
        self._decided_on: object = None
        self._decided_at = now
        self._dead: list[Verdict] = []
        self._news: list[Alarm | Standstill | VerdictCancelled | BadCounts] = []
        self._stopped: set[Member] = set()  # as their node agents say
        self._judged_while_stopped: set[Member] = set()
        for record in state.records.values():
            self.on_change(RecordPut(record=record), state, now)
        for verdict in state.verdicts.values():
            self.membership.on_verdict(verdict)
        if state.expert_map is not None:
            self.on_change(MapPut(expert_map=state.expert_map), state, now)
        for suspicion in state.suspicions.values():
            self.on_change(SuspicionRaised(suspicion=suspicion), state, now)
        for view in state.views.values():
            self._take(self.detector.on_view(view, now, is_news=False))

    def on_change(self, change: StateChange, state: ClusterState, now: float) -> None:
        """`state` contains the change."""
        detector = self.detector
        match change:
            case RecordPut():
                record = change.record
                self._take(detector.on_record(record.member, record.node, now))
            case RecordDeleted():
                self._take(detector.on_record_deleted(change.member, now))
            case SuspicionRaised():
                self._take(detector.on_suspicion(change.suspicion, now))
            case ViewPut():
                self._on_view(change.view, state, now)
            case MapPut():
                if state.is_map_stored:
                    self.offers.on_written(change.expert_map.epoch)
                self._on_map(change.expert_map, now)
            case DesiredPut():
                detector.set_paused(change.desired.verdicts_paused)
            case VerdictPut():
                self.membership.on_verdict(change.verdict)
                if state.expert_map is not None:
                    self._on_map(state.expert_map, now)

    def on_probe(self, event: ProbeEvent, now: float) -> None:
        detector = self.detector
        match event:
            case ProbeConnected():
                self._take(detector.on_probe_connected(event.member, now))
            case ProbeBroken():
                self._take(detector.on_probe_broken(event.member, now))
                self.offers.on_broken(event.member)
            case ProbeRefused():
                self._take(detector.on_probe_refused(event.member, now))
            case ProbePong():
                self._take(detector.on_pong(event.member, event.pong, now))
                self.offers.on_pong(event.member, event.pong.epoch, now)
                self.membership.on_pong(event.member, event.pong, now)
                self._on_left_out(event.pong.left_out, now)
            case ProbeCounts():
                detail = self.membership.rebalancer.on_counts(event.member, event.counts, now)
                if detail is not None:
                    self._news.append(BadCounts(detail=detail))

    def _on_left_out(self, members: tuple[Member, ...], now: float) -> None:
        """Their peers run maps without them that another leader gave them, or this process in an
        earlier term. They may be registered still, and alive."""
        unknown = [member for member in members if member not in self.membership.dead]
        self._take([*verdicts_on(unknown, SuspicionReason.OFFERED, epoch=0, now=now)])

    def on_tick(self, state: ClusterState, now: float) -> None:
        steps_paused = bool(self.membership.dead_in_map(state))
        self._take(self.detector.on_tick(now, steps_paused=steps_paused))

    def decide(self, state: ClusterState, now: float, *, unix_now: float = 0.0) -> Decision | None:
        """The next write or computation. `unix_now` is the same moment in Unix seconds. If nothing
        that membership reads has changed, as after most Pongs, it is asked again only every
        _RECHECK_S, because some of its rules wait for time."""
        inputs = (state.version, self.membership.dead, self.detector.frozen)
        if inputs == self._decided_on and now - self._decided_at < _RECHECK_S:
            return None
        self._decided_on, self._decided_at = inputs, now
        return self.membership.decide(state, now, unix_now=unix_now, frozen=self.detector.frozen)

    def map_to_offer(self, state: ClusterState, now: float) -> PublishMap | None:
        """The map that the ranks shall have now, though etcd cannot be written: the one without the
        dead, or the newest, if a rank had not read it before. None: there is none, or the ranks do
        not answer. Its loads and verdicts wait for etcd."""
        newest = state.expert_map
        if newest is None or not self.offers.has_majority(newest, now):
            return None
        decision = self.membership.decide(state, now, frozen=True)
        if isinstance(decision, PublishMap) and not decision.assignments:
            following = decision.expert_map
            if following.members != newest.members:
                return decision if self.offers.may_offer(following.epoch) else None
        return PublishMap(expert_map=newest) if self.offers.lag(newest, now) else None

    def map_to_repeat(self, state: ClusterState, now: float) -> ExpertMap | None:
        """The newest map, if etcd has it and a member that answers seems not to have read it. It
        stands still in an older one, and its peers wait for it. To be asked at each tick."""
        newest = state.expert_map
        if newest is None or not self.offers.is_unread(newest, now):
            return None
        return newest if state.is_map_stored else None

    def take_judgements(self) -> list[Judgement]:
        """The judgements since the last call, for the log."""
        judgements: list[Judgement] = [*self._dead, *self._news]
        judgements += self.membership.take_alarms()
        self._dead, self._news = [], []
        return judgements

    def _on_view(self, view: ProcessView, state: ClusterState, now: float) -> None:
        """A process that goes on before the verdict on it is written is not dead: `Publisher`
        writes none if its node agent has said so before."""
        member = view.member
        if view.state is ProcessState.STOPPED:
            self._stopped.add(member)
        else:
            self._stopped.discard(member)
            expert_map = state.expert_map
            is_written = member in state.verdicts
            is_in_map = expert_map is not None and expert_map.has(member)
            if member in self._judged_while_stopped and is_in_map and not is_written:
                assert expert_map is not None
                self._judged_while_stopped.discard(member)
                self.membership.withdraw(member)
                self._news.append(VerdictCancelled(member=member))
                self._on_map(expert_map, now)
        self._take(self.detector.on_view(view, now))

    def _on_map(self, expert_map: ExpertMap, now: float) -> None:
        dead = self.membership.dead
        alive = [m for m in expert_map.members if m not in dead]
        self._stopped.intersection_update(expert_map.members)
        self._judged_while_stopped.intersection_update(expert_map.members)
        self._take(self.detector.on_members(alive, now))

    def _take(self, judgements: list[Judgement]) -> None:
        for judgement in judgements:
            if isinstance(judgement, Verdict):
                if (
                    judgement.member in self._stopped
                    and judgement.cause is not SuspicionReason.EXIT
                ):
                    self._judged_while_stopped.add(judgement.member)
                self.membership.on_dead(judgement)
                self._dead.append(judgement)
            elif isinstance(judgement, Standstill):
                self.membership.on_standstill()
                self._news.append(judgement)
            else:
                self._news.append(judgement)
