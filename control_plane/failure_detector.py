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
    any       | accused, waited for, and no step moves for long     | all begin together (a resync)
    any       | comes to the newest epoch after others              | the steps' time begins anew
    any       | the same after that, and others are not waited for  | the most waited for is dead

"Held: own link" means that more than half of the members are silent, so we may be cut off
ourselves. "Held: mass expiry" means that more than half of the members lost their leases at once,
without any other sign of death, so etcd is the likely cause. They then have as long as a lease
lasts; after that, those that neither registered again nor answer are dead. A member that was never
probed is not silent: a new leader does not know the address of a member without a record. Silence
is measured in *attentive* time, which does not count our own stalls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from control_plane.judgements import Alarm, AlarmKind, Judgement, Standstill
from control_plane.silence import Rhythm, SilenceEvidence, SilenceTimings, patience_s
from control_plane.watched_member import ProbeState, WatchedMember
from shared.records import ProcessView, Suspicion, Verdict
from shared.types import (
    ACCUSERS,
    Accuser,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorTimings:
    silence: SilenceTimings = SilenceTimings()
    # What a node agent said of a process that is not stopped says nothing after this long.
    view_age_max_s: float = 0.3
    # The same for a stopped one, of which the node agent says so again while it is suspected.
    stopped_view_age_max_s: float = 3.0
    # A sign of life that is so much newer than a view which says "stopped" disproves it.
    answer_under_way_s: float = 0.05
    # A node agent that did not run for this long was paused or starved, and so was its host.
    host_gap_min_s: float = 0.1
    # A member that is probed at the urgent interval and has not answered for this long is quiet.
    quiet_s: float = 0.06
    # Most members have been quiet for this long: our own link is suspect.
    own_link_s: float = 0.25
    # Time to register again after a lost lease: a little more than a keep-alive interval.
    reregister_timeout_s: float = 2.0
    # The same, if most leases expired at once: as long as a lease lasts.
    mass_expiry_grace_s: float = 5.0
    # A member that is not suspected becomes so after this long without an answer.
    probe_silence_s: float = 1.2
    # Members have waited for an accused member for this long, and no step has completed. Then all
    # begin together; a member dies only if after that no step completes for as long again.
    stuck_s: float = 2.5
    # Time between two events beyond this is our own stall, and not attentive time.
    gap_max_s: float = 0.25
    gap_max_urgent_s: float = 0.03


class FailureDetector:
    """Call the `on_` method of each event with `now`, in monotonic seconds. Each returns the new
    judgements; every dead member is returned once, as a Verdict with epoch 0."""

    def __init__(self, timings: DetectorTimings, now: float) -> None:
        self._timings = timings
        self._watched: dict[Member, WatchedMember] = {}
        self._registered: dict[Member, NodeId] = {}
        self._rhythm = Rhythm(now)
        self._host_paused_attentive_s: dict[NodeId, float] = {}  # by node, when it was last so
        self._now = now
        self._attentive_s = 0.0
        self._own_link_suspect_attentive_s = -inf
        self._progress: tuple[int, int] = (0, 0)
        # The time of the last progress, or of the first wait after it: sleeping ranks do not wait.
        self._progress_attentive_s = 0.0
        self._began_together = False  # since a step last completed
        self._alarmed: set[AlarmKind] = set()

    @property
    def urgent(self) -> bool:
        """Whether to probe at the urgent interval: all members, so that a silent member can be told
        from our own lost link."""
        return any(w.suspected_attentive_s is not None for w in self._watched.values())

    @property
    def frozen(self) -> bool:
        """Most leases expired at once, and not all members have registered again. Only deaths may
        change the map."""
        return any(w.lease_grace for w in self._watched.values())

    @property
    def doubts(self) -> tuple[Suspicion, ...]:
        """One suspicion of ours for each suspected member. Its node agent watches for these."""
        return tuple(
            self._own_suspicion(w, _own_reason(w), "suspected by the control plane")
            for w in self._watched.values()
            if w.suspected_attentive_s is not None and w.signals
        )

    @property
    def suspected(self) -> tuple[Member, ...]:
        return tuple(m for m, w in self._watched.items() if w.suspected_attentive_s is not None)

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
        self._note_progress(0, 0, forget=True)
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
        if view.host_gap_ms / 1000 >= self._timings.host_gap_min_s and watched.node is not None:
            self._host_paused_attentive_s[watched.node] = self._attentive_s
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
        self._note_progress(pong.epoch, pong.step)
        self._note_adopted(watched, pong.epoch)
        watched.probe = ProbeState.CONNECTED
        watched.waiting_for = frozenset(pong.waiting_for)
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
            self._note_progress(0, 0, forget=True)
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

    def _note_progress(self, epoch: int, step: int, *, forget: bool = False) -> None:
        if not forget and epoch == self._progress[0] and step > self._progress[1]:
            self._began_together = False
            self._alarmed.discard(AlarmKind.STANDSTILL)
        if forget or (epoch, step) > self._progress:
            self._progress = (0, 0) if forget else (epoch, step)
            self._progress_attentive_s = self._attentive_s
            for watched in self._watched.values():
                watched.accusers.clear()

    def _note_adopted(self, watched: WatchedMember, epoch: int) -> None:
        """A member that comes to the newest epoch late could not before: what kept it, as a cut
        link does, has just ended, and the step may need as long as any from here. Each member
        comes to an epoch once, so this cannot go on for ever."""
        if epoch > watched.epoch and epoch == self._progress[0]:
            self._progress_attentive_s = self._attentive_s
        watched.epoch = max(watched.epoch, epoch)

    # Judgements.

    def _judge_all(self) -> list[Judgement]:
        self._drop_old_views()
        alarms = self._judge_mass_expiry() + self._judge_own_link()
        dead: list[Judgement] = []
        for watched in list(self._watched.values()):
            cause = self._cause_of_death(watched)
            if cause is None and self._is_silent(watched):
                cause = watched.signals[0].reason
            if cause is not None:
                dead.append(self._declare_dead(watched, cause))
        return alarms + dead + self._judge_stuck()

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
        is_host_silent = self._is_host_silent(watched)
        if is_host_silent:
            watched.host_silent_attentive_s = self._attentive_s
        else:
            # Processes of a paused host do not all continue at one instant.
            since_attentive_s = max(since_attentive_s, watched.host_silent_attentive_s)
        if watched.is_stopped:
            # What it was silent for while it ran says nothing of the stop.
            since_attentive_s = max(since_attentive_s, watched.stopped_attentive_s)
        evidence = SilenceEvidence(
            view=self._view_of(watched),
            is_host_silent=is_host_silent,
            usual_s=self._rhythm.usual_s(self._attentive_s),
            announced_s=watched.announced_until_attentive_s - since_attentive_s,
        )
        waited_s = self._attentive_s - since_attentive_s
        return waited_s >= patience_s(evidence, self._timings.silence)

    def _view_of(self, watched: WatchedMember) -> ProcessState | None:
        """A stopped process stays so until its node agent says otherwise, or nothing for long."""
        age_s = self._attentive_s - watched.view_attentive_s
        if watched.is_stopped or age_s <= self._timings.view_age_max_s:
            return watched.view
        return None

    def _is_host_silent(self, watched: WatchedMember) -> bool:
        """Whether the whole host is quiet or stopped, or its node agent itself did not run. If most
        members are stopped at once, something has stopped their hosts; so it is with the last
        member of all: nobody answers who could show that its host runs, nobody waits for it, and
        its sessions can go nowhere else."""
        num_stopped = sum(w.is_stopped for w in self._watched.values())
        if watched.is_stopped and 2 * num_stopped > len(self._watched):
            return True
        if watched.node is None:
            return False
        paused_attentive_s = self._host_paused_attentive_s.get(watched.node, -inf)
        if self._attentive_s - paused_attentive_s < self._timings.silence.host_pause_s:
            return True
        others = [
            other
            for other in self._watched.values()
            if other.node == watched.node and other is not watched and not other.is_never_probed
        ]
        return bool(others) and all(self._is_quiet(other) for other in others)

    def _is_quiet(self, watched: WatchedMember) -> bool:
        """Stopped, or asked and not heard, and its node agent does not say that it runs."""
        if watched.is_stopped:
            return True
        asked_attentive_s = self._urgent_since_attentive_s()
        if asked_attentive_s is None or self._view_of(watched) is not None:
            return False
        heard_attentive_s = max(watched.pong_attentive_s, asked_attentive_s)
        return self._attentive_s - heard_attentive_s >= self._timings.quiet_s

    def _urgent_since_attentive_s(self) -> float | None:
        """Since when all members are probed at the urgent interval."""
        return min(
            (
                w.suspected_attentive_s
                for w in self._watched.values()
                if w.suspected_attentive_s is not None
            ),
            default=None,
        )

    def _is_own_link_suspect(self) -> bool:
        """Whether more than half of the members have not answered for the whole window, though they
        were probed at the urgent interval and show no other sign of death."""
        asked_attentive_s = self._urgent_since_attentive_s()
        if asked_attentive_s is None:
            return False
        asked = [w for w in self._watched.values() if not w.is_never_probed]
        heard_nothing = [
            w
            for w in asked
            if w.probe in (ProbeState.CONNECTED, ProbeState.UNTRIED)
            and not w.is_stopped
            and self._attentive_s - max(w.pong_attentive_s, asked_attentive_s)
            >= self._timings.own_link_s
        ]
        return 2 * len(heard_nothing) > len(asked)

    def _judge_own_link(self) -> list[Judgement]:
        """While our own link is suspect, silence does not count, neither then nor later."""
        if not self._is_own_link_suspect():
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

    def _judge_stuck(self) -> list[Judgement]:
        if not any(w.waiting_for for w in self._watched.values()):
            self._progress_attentive_s = self._attentive_s
        if self._attentive_s - self._progress_attentive_s < self._timings.stuck_s:
            return []
        # Old Pongs do not count: the missing progress may be our own lost link.
        heard = [
            w
            for w in self._watched.values()
            if self._attentive_s - w.pong_attentive_s < self._timings.probe_silence_s
        ]
        waits = Counter(rank for w in heard for rank in w.waiting_for)
        accused = [w for w in self._watched.values() if w.accusers and waits[w.member.rank] > 0]
        if not accused or any(self._is_excused(w) for w in accused):
            return []
        stood_still_s = self._attentive_s - self._progress_attentive_s
        self._note_progress(0, 0, forget=True)
        if not self._began_together:
            self._began_together = True
            return [Standstill()]
        most = max(waits[w.member.rank] for w in accused)
        if all(waits[w.member.rank] == most for w in heard):
            # Who waits for all does not say whom it cannot reach. A death would be a guess.
            detail = "no step completes, and all members wait for all others"
            return [Standstill(), *self._alarm(AlarmKind.STANDSTILL, detail)]
        worst = next(w for w in accused if waits[w.member.rank] == most)
        who_wait = sorted(str(w.member) for w in heard if worst.member.rank in w.waiting_for)
        detail = (
            f"no step completes for {stood_still_s:.1f} s, and {', '.join(who_wait[:16])} wait for it"
        )
        self._suspect(worst, self._own_suspicion(worst, SuspicionReason.LINK, detail))
        worst.first_signal_at = min(worst.first_signal_at, self._now - stood_still_s)
        return [self._declare_dead(worst, SuspicionReason.LINK)]

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


def _own_reason(watched: WatchedMember) -> SuspicionReason:
    """The first that is ours to give: what its peers saw is theirs to say (`ACCUSERS`)."""
    ours = (s.reason for s in watched.signals if Accuser.CONTROL_PLANE in ACCUSERS[s.reason])
    return next(ours, SuspicionReason.SILENCE)
