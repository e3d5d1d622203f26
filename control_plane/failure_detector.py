"""Judges which members of the map are dead, by combining the signals on each incarnation. Pure: it
neither probes nor publishes.

Theory of operation. A signal alone makes a member *suspected*; the prober then probes all members
at the urgent interval. What the kernel of the member's host reports is proof: its exit, a refused
connection, or a broken connection together with a suspicion from somebody else. Silence is proof
only if it lasted as long as `silence` says while we were listening and heard others. A rank is
known to be alive if its event loop and its engine thread run: a Pong came, and the Pong's
`engine_age_ms` is small. Such a Pong *vouches* for the member. An engine that waits for peers
keeps its age small; a stuck engine does not.

    state     | signal                                              | next
    ----------+-----------------------------------------------------+--------------------------
    trusted   | suspicion; probes unanswered; connection broken     | suspected
    trusted   | its node agent says that its process is stopped     | suspected
    trusted   | record gone                                         | unleased
    suspected | a vouching Pong, newer than the first signal        | trusted
    suspected | connection broken and somebody else's suspicion     | dead
    suspected | no vouching Pong for longer than `silence` allows   | dead, or held: own link
    any       | a Pong announces what may keep it from answering    | silence is excused until then
    unleased  | registered again                                    | suspected (until a Pong)
    unleased  | connection broken; reregister timeout               | dead, or held: mass expiry
    any       | exit; connection refused; a successor registered    | dead
    any       | it and another do not hear each other, we hear both | one of the two is dead
    any       | accused, waited for, and no step moves for long     | all begin together (a resync)
    any       | comes to the newest epoch after others              | the steps' time begins anew
    any       | the same after that, and others are not waited for  | the most waited for is dead
    any       | anything but an exit, while verdicts are paused     | as it was

"Held: own link" means that more than half of the members are silent, so we may be cut off
ourselves. "Held: mass expiry" means that more than half of the members lost their leases at once,
without any other sign of death, so etcd is the likely cause. They then have as long as a lease
lasts; after that, those that neither registered again nor answer are dead. A member that was never
probed is not silent: a new leader does not know the address of a member without a record. Silence
is measured in *attentive* time, which does not count our own stalls.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from control_plane.common_silence import CommonSilence
from control_plane.cut_links import find_cut_off
from control_plane.detector_timings import DetectorTimings
from control_plane.judgements import Alarm, AlarmKind, Judgement, Standstill
from control_plane.silence import SilenceEvidence, patience_s
from control_plane.standstill import StandstillWatch
from control_plane.watched_member import ProbeState, WatchedMember
from shared.records import ProcessView, Suspicion, Verdict
from shared.rhythm import Rhythm
from shared.types import (
    Epoch,
    Member,
    NodeId,
    ProcessState,
    Step,
    SuspicionReason,
)
from shared.wire import Pong

OWN_NAME = "control-plane"
SIGNALS_MAX = 16
_INSTANT = frozenset({SuspicionReason.RESET, SuspicionReason.LINK, SuspicionReason.EXCHANGE})


class FailureDetector:
    """Call the `on_` method of each event with `now`, in monotonic seconds. Each returns the new
    judgements; every dead member is returned once, as a Verdict with epoch 0."""

    def __init__(self, timings: DetectorTimings, now: float) -> None:
        self._timings = timings
        self._watched: dict[Member, WatchedMember] = {}
        self._registered: dict[Member, NodeId] = {}
        self._rhythm = Rhythm(now)
        self._common_silence = CommonSilence(timings)
        self._standstill = StandstillWatch(timings)
        self._now = now
        self._attentive_s = 0.0
        self._own_link_suspect_attentive_s = -inf
        self._alarmed: set[AlarmKind] = set()
        self._is_paused = False

    @property
    def urgent(self) -> bool:
        """Whether to probe at the urgent interval: all members, so that a silent member can be told
        from our own lost link."""
        return any(w.suspected_attentive_s is not None or w.unheard for w in self._watched.values())

    @property
    def frozen(self) -> bool:
        """Most leases expired at once, and not all members have registered again. Only deaths may
        change the map."""
        return any(w.lease_grace for w in self._watched.values())

    @property
    def doubts(self) -> tuple[Suspicion, ...]:
        """One suspicion of ours for each suspected member. Its node agent watches for these."""
        return tuple(
            self._own_suspicion(w, w.signals[0].reason, "suspected by the control plane")
            for w in self._watched.values()
            if w.suspected_attentive_s is not None and w.signals
        )

    @property
    def suspected(self) -> tuple[Member, ...]:
        return tuple(m for m, w in self._watched.items() if w.suspected_attentive_s is not None)

    def set_paused(self, is_paused: bool) -> None:
        """While verdicts are paused only processes that are seen to have ended are dead. What else
        was seen counts once verdicts go on."""
        self._is_paused = is_paused

    def on_members(self, members: Iterable[Member], now: float) -> list[Judgement]:
        """The members of the newest map, without those already judged dead."""
        self._advance_attentive_time(now)
        wanted = set(members)
        self._watched = {m: w for m, w in self._watched.items() if m in wanted}
        for member in wanted - self._watched.keys():
            watched = WatchedMember(
                member,
                self._attentive_s,
                node=self._registered.get(member),
                pong_attentive_s=self._attentive_s,
            )
            self._watched[member] = watched
            if member not in self._registered:
                self._lose_lease(watched)
        self._standstill.restart(self._watched.values(), self._attentive_s)
        return self._judge_all()

    def on_record(self, member: Member, node: NodeId, now: float) -> list[Judgement]:
        """`member` registered, perhaps again under another lease."""
        self._advance_attentive_time(now)
        self._registered[member] = node
        watched = self._watched.get(member)
        if watched is not None:
            watched.node = node
        if watched is not None and watched.unleased_attentive_s is not None:
            self._restart_silence(watched)
            watched.unleased_attentive_s, watched.lease_grace = None, False
            if watched.suspected_attentive_s is None:
                watched.signals.clear()
        return self._judge_all()

    def on_record_deleted(self, member: Member, now: float) -> list[Judgement]:
        self._advance_attentive_time(now)
        self._registered.pop(member, None)
        watched = self._watched.get(member)
        if watched is None:
            return []
        self._lose_lease(watched)
        return self._judge_all()

    def on_suspicion(self, suspicion: Suspicion, now: float) -> list[Judgement]:
        self._advance_attentive_time(now)
        watched = self._watched.get(suspicion.member)
        if watched is None or suspicion.by == OWN_NAME:
            return []
        watched.exited |= suspicion.reason is SuspicionReason.EXIT
        watched.accusers.add(suspicion.by)
        self._suspect(watched, suspicion)
        return self._judge_all()

    def on_view(self, view: ProcessView, now: float, *, is_news: bool = True) -> list[Judgement]:
        """What the node agent says of the member's process. A stopped one is suspected at once; any
        other view only says how much its silence means. One that is not news, which etcd held
        before this term began, only makes a suspect: the agent looks again then."""
        self._advance_attentive_time(now)
        watched = self._watched.get(view.member)
        if watched is None:
            return []
        if not is_news:
            if view.state is ProcessState.STOPPED:
                self._suspect_stopped(watched)
            return self._judge_all()
        if watched.node is not None:
            gap_s = view.host_gap_ms / 1000
            self._common_silence.on_host_gap(watched.node, gap_s, self._attentive_s)
        if view.state is ProcessState.STOPPED and not watched.is_stopped:
            watched.stopped_attentive_s = self._attentive_s
        watched.view, watched.view_attentive_s = view.state, self._attentive_s
        if view.state is ProcessState.STOPPED:
            self._suspect_stopped(watched)
        return self._judge_all()

    def on_probe_connected(self, member: Member, now: float) -> list[Judgement]:
        self._advance_attentive_time(now)
        watched = self._watched.get(member)
        if watched is not None:
            self._restart_silence(watched)
            watched.probe = ProbeState.CONNECTED
        return self._judge_all()

    def on_probe_broken(self, member: Member, now: float) -> list[Judgement]:
        return self._on_probe_failed(member, ProbeState.BROKEN, "probe connection broken", now)

    def on_probe_refused(self, member: Member, now: float) -> list[Judgement]:
        return self._on_probe_failed(member, ProbeState.REFUSED, "probe connection refused", now)

    def on_pong(self, member: Member, pong: Pong, now: float) -> list[Judgement]:
        self._advance_attentive_time(now)
        watched = self._watched.get(member)
        if watched is None:
            return []
        at_step = pong.epoch, pong.step
        members = self._watched.values()
        if self._standstill.on_pong(watched, at_step, members, self._attentive_s):
            self._alarmed.discard(AlarmKind.STANDSTILL)
        watched.probe = ProbeState.CONNECTED
        watched.waiting_for = frozenset(pong.waiting_for)
        watched.unheard = {
            peer.rank: self._attentive_s - peer.for_ms / 1000 for peer in pong.unheard
        }
        watched.announced_until_attentive_s = self._attentive_s + max(
            (each.at_most_ms / 1000 for each in pong.announced), default=-inf
        )
        watched.pong_attentive_s = self._attentive_s
        if watched.suspected_attentive_s is None:
            self._rhythm.observe(pong.engine_age_ms / 1000, self._attentive_s)
        heartbeat_attentive_s = self._attentive_s - pong.engine_age_ms / 1000
        said_attentive_s = watched.view_attentive_s + self._timings.answer_under_way_s
        if watched.is_stopped and heartbeat_attentive_s > said_attentive_s:
            watched.view = None
        gap_s = heartbeat_attentive_s - watched.heartbeat_attentive_s
        if gap_s > self._timings.answer_gap_max_s:
            watched.answering_since_attentive_s = heartbeat_attentive_s
        if gap_s > self._timings.prompt_gap_max_s:
            watched.prompt_since_attentive_s = heartbeat_attentive_s
        watched.heartbeat_attentive_s = max(watched.heartbeat_attentive_s, heartbeat_attentive_s)
        if (
            watched.suspected_attentive_s is not None
            and watched.heartbeat_attentive_s > watched.suspected_attentive_s
            and not watched.is_stopped
        ):
            self._trust(watched)
        return self._judge_all()

    def on_tick(self, now: float, *, steps_paused: bool = False) -> list[Judgement]:
        """`steps_paused`: no step completes because weights are loaded for orphans, which is no
        fault of any member."""
        self._advance_attentive_time(now)
        if steps_paused:
            self._standstill.restart(self._watched.values(), self._attentive_s)
        for watched in self._watched.values():
            probe_silence_s = self._attentive_s - max(
                watched.pong_attentive_s, watched.added_attentive_s
            )
            if (
                watched.suspected_attentive_s is None
                and probe_silence_s > self._timings.probe_silence_s
            ):
                self._suspect(
                    watched, self._own_suspicion(watched, SuspicionReason.SILENCE, "no answer")
                )
        return self._judge_all()

    # Attentive time.

    def _advance_attentive_time(self, now: float) -> None:
        timings = self._timings
        gap_max_s = timings.gap_max_urgent_s if self.urgent else timings.gap_max_s
        self._attentive_s += min(max(0.0, now - self._now), gap_max_s)
        self._now = max(now, self._now)

    # Signals.

    def _suspect(self, watched: WatchedMember, signal: Suspicion) -> None:
        if not watched.signals:
            watched.first_signal_at = self._now
        if len(watched.signals) < SIGNALS_MAX:
            watched.signals.append(signal)
        if watched.suspected_attentive_s is None:
            watched.suspected_attentive_s = self._attentive_s

    def _suspect_stopped(self, watched: WatchedMember) -> None:
        detail = "its node agent says that the process is stopped"
        self._suspect(watched, self._own_suspicion(watched, SuspicionReason.STOPPED, detail))

    def _restart_silence(self, watched: WatchedMember) -> None:
        """If its address was unknown until now, it was not silent before."""
        if watched.is_never_probed:
            watched.suspected_attentive_s = watched.pong_attentive_s = self._attentive_s

    def _trust(self, watched: WatchedMember) -> None:
        watched.suspected_attentive_s = None
        if watched.unleased_attentive_s is None:
            watched.signals.clear()

    def _lose_lease(self, watched: WatchedMember) -> None:
        if watched.unleased_attentive_s is None:
            watched.unleased_attentive_s = self._attentive_s
            self._suspect(
                watched, self._own_suspicion(watched, SuspicionReason.LEASE, "record gone")
            )

    def _on_probe_failed(
        self, member: Member, probe: ProbeState, detail: str, now: float
    ) -> list[Judgement]:
        self._advance_attentive_time(now)
        watched = self._watched.get(member)
        if watched is None:
            return []
        watched.probe = probe
        self._suspect(watched, self._own_suspicion(watched, SuspicionReason.RESET, detail))
        return self._judge_all()

    def _own_suspicion(
        self, watched: WatchedMember, reason: SuspicionReason, detail: str
    ) -> Suspicion:
        return Suspicion(
            rank=watched.member.rank,
            incarnation=watched.member.incarnation,
            by=OWN_NAME,
            reason=reason,
            epoch=Epoch(0),
            step=Step(0),
            raised_at=self._now,
            detail=detail,
        )

    # Judgements.

    def _judge_all(self) -> list[Judgement]:
        self._drop_old_views()
        alarms = self._judge_mass_expiry() + self._judge_own_link()
        dead: list[Judgement] = []
        for watched in list(self._watched.values()):
            cause = self._cause_of_death(watched)
            if cause is None and self._is_silent(watched):
                cause = watched.signals[0].reason
            if self._is_paused and cause is not SuspicionReason.EXIT:
                continue
            if cause is not None:
                dead.append(self._declare_dead(watched, cause))
        return alarms + dead + self._judge_cut_links() + self._judge_stuck()

    def _drop_old_views(self) -> None:
        """A node agent that is gone cannot say that the process goes on."""
        for watched in self._watched.values():
            age_s = self._attentive_s - watched.view_attentive_s
            if watched.is_stopped and age_s > self._timings.stopped_view_age_max_s:
                watched.view = None

    def _cause_of_death(self, watched: WatchedMember) -> SuspicionReason | None:
        if watched.exited or self._has_successor(watched.member):
            return SuspicionReason.EXIT
        if watched.probe is ProbeState.REFUSED:
            return watched.signals[0].reason
        if watched.probe is ProbeState.BROKEN and any(
            s.by != OWN_NAME and s.reason in _INSTANT for s in watched.signals
        ):
            return watched.signals[0].reason
        if watched.unleased_attentive_s is not None:
            waited_s = self._attentive_s - watched.unleased_attentive_s
            grace_s = self._lease_grace_s(watched, watched.unleased_attentive_s)
            is_overdue = waited_s >= grace_s and not self._is_excused(watched)
            if watched.probe is ProbeState.BROKEN or is_overdue:
                return SuspicionReason.LEASE
        return None

    def _is_excused(self, watched: WatchedMember) -> bool:
        """Whether it announced what may keep it from answering now, and that can be believed."""
        until_attentive_s = min(
            watched.announced_until_attentive_s,
            watched.heartbeat_attentive_s + self._timings.silence.announced_max_s,
        )
        return self._attentive_s < until_attentive_s and not watched.is_stopped

    def _lease_grace_s(self, watched: WatchedMember, unleased_attentive_s: float) -> float:
        if not watched.lease_grace:
            return self._timings.reregister_timeout_s
        if watched.heartbeat_attentive_s > unleased_attentive_s:
            return inf
        return self._timings.mass_expiry_grace_s

    def _is_silent(self, watched: WatchedMember) -> bool:
        if watched.suspected_attentive_s is None or watched.is_never_probed:
            return False
        since_attentive_s = max(
            watched.suspected_attentive_s,
            watched.heartbeat_attentive_s,
            self._own_link_suspect_attentive_s,
        )
        members = self._watched.values()
        is_host_silent = self._common_silence.is_host_silent(watched, members, self._attentive_s)
        if is_host_silent:
            watched.host_silent_attentive_s = self._attentive_s
        else:
            # Processes of a paused host do not all continue at one instant.
            since_attentive_s = max(since_attentive_s, watched.host_silent_attentive_s)
        if watched.is_stopped:
            # What it was silent for while it ran says nothing of the stop.
            since_attentive_s = max(since_attentive_s, watched.stopped_attentive_s)
        evidence = SilenceEvidence(
            view=watched.view_at(self._attentive_s, self._timings.view_age_max_s),
            is_host_silent=is_host_silent,
            usual_s=self._rhythm.usual_s(self._attentive_s),
            announced_s=watched.announced_until_attentive_s - since_attentive_s,
        )
        waited_s = self._attentive_s - since_attentive_s
        return waited_s >= patience_s(evidence, self._timings.silence)

    def _judge_own_link(self) -> list[Judgement]:
        """While our own link is suspect, silence does not count, neither then nor later."""
        members = self._watched.values()
        if not self._common_silence.is_own_link_suspect(members, self._attentive_s):
            self._alarmed.discard(AlarmKind.OWN_LINK)
            return []
        self._own_link_suspect_attentive_s = self._attentive_s
        detail = "most members are silent at once; nobody is judged by silence"
        return self._alarm(AlarmKind.OWN_LINK, detail)

    def _has_successor(self, member: Member) -> bool:
        return any(
            other.rank == member.rank and other.incarnation > member.incarnation
            for other in self._registered
        )

    def _judge_mass_expiry(self) -> list[Judgement]:
        held = [w for w in self._watched.values() if w.may_be_alive_without_lease]
        if 2 * len(held) <= len(self._watched):
            if not self.frozen:
                self._alarmed.discard(AlarmKind.MASS_EXPIRY)
            return []
        for watched in held:
            watched.lease_grace = True
        names = ", ".join(sorted(str(w.member) for w in held))
        detail = f"leases of ranks {names} expired at once; the map is frozen"
        return self._alarm(AlarmKind.MASS_EXPIRY, detail)

    def _judge_cut_links(self) -> list[Judgement]:
        dead: list[Judgement] = []
        while (
            found := find_cut_off(
                self._watched.values(), self._attentive_s, self._timings, self._is_excused
            )
        ) is not None:
            blamed = found.blamed
            self._suspect(blamed, self._own_suspicion(blamed, SuspicionReason.LINK, found.detail))
            blamed.first_signal_at = min(blamed.first_signal_at, self._now - found.seconds)
            dead.append(self._declare_dead(blamed, SuspicionReason.LINK))
        return dead

    def _judge_stuck(self) -> list[Judgement]:
        found = self._standstill.look(self._watched.values(), self._attentive_s, self._is_excused)
        if found is None:
            return []
        if found.is_first or self._is_paused:
            return [Standstill()]
        if found.blamed is None:
            detail = "no step completes, and all members wait for all others"
            return [Standstill(), *self._alarm(AlarmKind.STANDSTILL, detail)]
        blamed = found.blamed
        self._suspect(blamed, self._own_suspicion(blamed, SuspicionReason.LINK, found.detail))
        blamed.first_signal_at = min(blamed.first_signal_at, self._now - found.seconds)
        return [self._declare_dead(blamed, SuspicionReason.LINK)]

    def _declare_dead(self, watched: WatchedMember, cause: SuspicionReason) -> Verdict:
        if not watched.signals:
            self._suspect(watched, self._own_suspicion(watched, cause, "its successor registered"))
        del self._watched[watched.member]
        return Verdict(
            rank=watched.member.rank,
            incarnation=watched.member.incarnation,
            cause=cause,
            signals=tuple(watched.signals),
            epoch=Epoch(0),
            first_signal_at=watched.first_signal_at,
            decided_at=self._now,
        )

    def _alarm(self, kind: AlarmKind, detail: str) -> list[Judgement]:
        if kind in self._alarmed:
            return []
        self._alarmed.add(kind)
        return [Alarm(kind=kind, detail=detail)]
