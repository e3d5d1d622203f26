"""The engine thread's loop: inbox, map, plan, begin, end, commit, post. Decides when a step runs;
the scheduler decides what it contains, and the runner computes it.

Theory of operation. Before each step the engine empties the inbox and adopts the newest map. While
a step is in flight it plans the next one and begins it behind the first, if the runner can do that
and no newer map is here. Then the hardware never pauses. If nothing is in flight:

    state                           what the engine does
    in no map yet, or behind it     sleeps until a newer map is here
    behind it for STRANDED_S        posts Stranded and returns
    a map that it may not adopt yet goes on under the old one, as far as the runner lets it
    a planned map                   goes on under the old one until a step that all members began
                                    knowing of it is committed: all adopt it then. At once if it is
                                    asleep, held or behind, the map has waited long, or a later one
                                    is in force
    in a map that leaves us out     posts Fenced and returns. FAREWELL_S later, if it has taken its
                                    last step with the others
    held                            posts Held; sleeps until a map newer than the hold is here
    awake                           runs the next step
      its peers moved on            abandons the plan; is behind its map
      nobody had work in it         sleeps, as all members do
    asleep, own work                posts SendWake, runs the next step
    asleep, Wake for that step      runs the next step
    asleep, a newer map             adopts it, runs its step 0

The engine sends a few KV replicas after each step, with the next step in flight if the runner can
do that. It also sends them while it waits for a map or the end of a hold. It never waits for them.

A Wake may arrive before its step is the next one here. It is kept until then. If the runner counts
steps across epochs, a Wake is valid in any epoch. Errors other than StepAbandoned leave `run`, and
must end the process.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from gpu_worker.engine.adoption_log import AdoptionLog
from gpu_worker.engine.kv_replication import KvReplicator
from gpu_worker.engine.mailbox import (
    Adopted,
    Arrival,
    DropOrigin,
    Fenced,
    Held,
    Hold,
    Inbox,
    InboxItem,
    NewMap,
    OrphanOrigin,
    Post,
    SendWake,
    StepTokens,
    Stop,
    Stranded,
)
from gpu_worker.engine.monitor import EngineMonitor
from gpu_worker.engine.no_kv_replication import NoKvReplication
from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.sequence import Origin
from gpu_worker.engine.step_plan import StepPlan
from gpu_worker.engine.step_runner import StepResult, StepRunner
from shared.clock import Clock
from shared.errors import StepAbandoned
from shared.types import Epoch, Member, RankId, Step
from shared.wire import Adoption, Cancel, Load, SessionTokens, Submit, Wake

STRANDED_S = 30.0
"""A rank that is behind its map for so long leaves and restarts."""
FAREWELL_S = 0.25
"""For so long a rank that has taken its last step with the others stays: some may still be in that
step, and would take it for dead."""
_PARK_S = 1.0  # a bound on each wait; every reason to go on notifies the inbox
_SEND_PENDING_S = 0.002  # between replicas of a parked engine; about as long as a step


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSnapshot:
    """What other threads may know of the engine. The fields may be of slightly different moments.
    `step` is the one that runs now or comes next."""

    epoch: Epoch
    step: Step
    engine_age_ms: float
    waiting_for: tuple[RankId, ...]
    load: Load
    steps_committed: int
    steps_abandoned: int
    tokens_generated: int
    tokens_drafted: int
    drafts_accepted: int
    blocks_restored: int
    adoptions: tuple[Adoption, ...]
    out_of_step: Epoch


class Engine:
    """The engine of one rank. Everything but `snapshot` runs on the engine thread."""

    def __init__(
        self,
        *,
        member: Member,
        runner: StepRunner,
        scheduler: Scheduler,
        inbox: Inbox,
        monitor: EngineMonitor,
        post: Post,
        clock: Clock,
        replicator: KvReplicator | None = None,
    ) -> None:
        """`replicator` is the scheduler's."""
        self._member = member
        self._runner = runner
        self._scheduler = scheduler
        self._inbox = inbox
        self._monitor = monitor
        self._post = post
        self._clock = clock
        self._replicator = replicator or NoKvReplication()
        self._newest: NewMap | None = None
        self._epoch = Epoch(0)  # 0: in no map yet
        self._step = Step(0)
        self._is_behind = False  # a step of our epoch was abandoned; its next map is not here yet
        self._behind_since = 0.0
        self._held_epoch = Epoch(0)  # no map up to this one may be run under
        self._asleep = False
        self._is_agreed = False  # all adopt the newest map now
        self._agreed_at = 0.0
        self._pads = False  # all run a step without tokens next
        self._in_flight: deque[StepPlan] = deque()  # begun and not ended
        self._last_wake = (Epoch(0), Step(0))
        self._adoptions = AdoptionLog()
        self._load = scheduler.load()
        self._steps_committed = 0
        self._steps_abandoned = 0
        self._tokens_generated = 0
        self._tokens_drafted = 0
        self._drafts_accepted = 0

    def _read_load(self) -> Load:
        timing = self._monitor.timing
        return replace(
            self._scheduler.load(),
            step_ms=timing.step_ms,
            waited_ms=timing.waited_ms,
            late_peers=timing.late_peers(),
        )

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            epoch=self._epoch,
            step=self._step,
            engine_age_ms=self._monitor.engine_age_ms(),
            waiting_for=self._monitor.waiting_for,
            load=self._load,
            steps_committed=self._steps_committed,
            steps_abandoned=self._steps_abandoned,
            tokens_generated=self._tokens_generated,
            tokens_drafted=self._tokens_drafted,
            drafts_accepted=self._drafts_accepted,
            blocks_restored=self._scheduler.num_restored,
            adoptions=self._adoptions.entries,
            out_of_step=self._runner.out_of_step,
        )

    def run(self) -> None:
        """Returns after Stop, or after it has posted Fenced or Stranded."""
        while not self._process_inbox(self._inbox.drain()):
            self._settle_grammars()
            if self._in_flight:
                self._begin_ahead()
                self._end_step()
                continue
            if self._is_fenced():
                if (left_s := self._farewell_s()) > 0:
                    self._monitor.park(left_s)
                    continue
                self._post(Fenced(epoch=self._newest_epoch()))
                return
            if self._is_stranded():
                self._post(Stranded(epoch=self._epoch))
                return
            self._adopt_newest()
            if self._try_claim_step():
                self._begin_step()
            else:
                stopped = self._is_behind or self._epoch <= self._held_epoch
                self._runner.flush(stopped=stopped)
                self._monitor.park(_SEND_PENDING_S if self._replicator.send_offered() else _PARK_S)

    def _process_inbox(self, items: list[InboxItem]) -> bool:
        """Returns whether to stop."""
        replies: dict[Origin, list[SessionTokens]] = {}
        stop = False
        now = self._clock.now() if items else 0.0
        for item in items:
            match item:
                case Arrival(origin=origin, submit=submit):
                    for to, reply in self._begin_attempt(origin, submit, now):
                        replies.setdefault(to, []).append(reply)
                case Cancel(session=session, attempt=attempt):
                    if (ended := self._scheduler.cancel(session, attempt)) is not None:
                        replies.setdefault(ended[0], []).append(ended[1])
                case OrphanOrigin(origin=origin):
                    self._scheduler.orphan_origin(origin)
                    replies.pop(origin, None)
                case DropOrigin(origin=origin):
                    self._scheduler.drop_origin(origin)
                    replies.pop(origin, None)
                case NewMap(expert_map=expert_map):
                    if expert_map.epoch > self._newest_epoch():
                        self._newest = item
                case Wake(epoch=epoch, step=step):
                    self._last_wake = max(self._last_wake, (epoch, step))
                case Hold(epoch=epoch):
                    self._held_epoch = max(self._held_epoch, epoch)
                    self._post(Held(epoch=epoch))
                case Stop():
                    stop = True
        if items:
            self._load = self._read_load()
            self._post_tokens(replies)
        return stop

    def _begin_attempt(
        self, origin: Origin, submit: Submit, now: float
    ) -> list[tuple[Origin, SessionTokens]]:
        """Returns what is to be said at once, and to whom."""
        if (taken_over := self._scheduler.take_over(origin, submit)) is not None:
            return taken_over
        reply = self._scheduler.submit(origin, submit, now)
        return [] if reply is None else [(origin, reply)]

    def _settle_grammars(self) -> None:
        """A mask is given a moment only if no step could run meanwhile."""
        replies = self._scheduler.settle_grammars(wait=not self._in_flight)
        if replies:
            self._load = self._read_load()
            self._post_tokens(replies)

    def _newest_epoch(self) -> Epoch:
        return self._newest.expert_map.epoch if self._newest is not None else Epoch(0)

    def _is_fenced(self) -> bool:
        """Whether the newest map leaves this rank out, after it was in an earlier one."""
        newest = self._newest
        return (
            self._epoch > 0
            and newest is not None
            and not newest.expert_map.has(self._member)
            and not self._waits_for_others()
        )

    def _farewell_s(self) -> float:
        return self._agreed_at + FAREWELL_S - self._clock.now() if self._is_agreed else 0.0

    def _waits_for_others(self) -> bool:
        """Whether the newest map is a planned one of which some member may not know, and steps go
        on meanwhile."""
        newest = self._newest
        if newest is None or newest.expert_map.epoch <= self._epoch or self._is_agreed:
            return False
        goes_on = self._epoch > self._held_epoch and not self._is_behind and not self._asleep
        has_time = self._clock.now() < newest.waits_until
        is_in_force = self._monitor.newest_epoch() > self._epoch  # it, or one before it
        return goes_on and has_time and not is_in_force and self._runner.adopts_together

    def _is_stranded(self) -> bool:
        return self._is_behind and self._clock.now() > self._behind_since + STRANDED_S

    def _adopt_newest(self) -> None:
        newest = self._newest
        if newest is None or newest.expert_map.epoch <= max(self._epoch, self._held_epoch):
            return
        if not newest.expert_map.has(self._member) or self._waits_for_others():
            return
        if not self._runner.prepare_to_adopt(newest.expert_map):
            return
        try:
            first_step = self._runner.adopt(newest.expert_map)
        except StepAbandoned:
            self._fall_behind()
            return
        self._epoch = newest.expert_map.epoch
        self._monitor.num_members = len(newest.expert_map.members)
        self._replicator.use([m for m in newest.expert_map.members if m != self._member])
        self._set_step(first_step)
        adoption = self._adoptions.record_adoption(
            self._epoch,
            seen_at=newest.seen_at,
            now=self._clock.now(),
            abandoned=self._is_behind,
        )
        self._is_behind = self._asleep = self._pads = self._is_agreed = False
        self._post(Adopted(expert_map=newest.expert_map, adoption=adoption))

    def _try_claim_step(self) -> bool:
        if self._epoch <= self._held_epoch or self._is_behind:
            return False
        if self._asleep and self._scheduler.has_work:
            self._post(SendWake(epoch=self._wake_epoch(), step=self._step))
            self._asleep = False
        elif self._asleep:
            epoch, step = self._last_wake
            self._asleep = not (epoch == self._wake_epoch() and step >= self._step)
        return not self._asleep and self._runner.claim_step()

    def _wake_epoch(self) -> Epoch:
        return Epoch(0) if self._runner.counts_across_epochs else self._epoch

    def _begin_step(self) -> None:
        has_work = self._scheduler.has_work
        self._scheduler.tenants_elsewhere = self._inbox.tenants
        scheduler = self._scheduler
        plan = scheduler.plan_nothing() if self._pads else scheduler.plan(self._clock.now())
        self._monitor.beat(())
        self._begin(plan, has_work=has_work)
        if not self._runner.can_run_ahead_of(plan):
            self._end_step()

    def _begin_ahead(self) -> None:
        """Begins a step behind the one in flight, if that is possible."""
        (before,) = self._in_flight
        if self._newest_epoch() > self._epoch or not self._inbox.may_run_ahead:
            return
        if not self._runner.can_run_ahead_of(before):
            return
        plan = self._scheduler.plan_ahead(self._clock.now())
        if plan is None:
            return
        if self._runner.claim_ahead():
            self._begin(plan, has_work=True)
        else:
            self._scheduler.abandon(plan)

    def _begin(self, plan: StepPlan, *, has_work: bool) -> None:
        step = Step(self._step + len(self._in_flight))
        self._in_flight.append(plan)
        knows_next = self._waits_for_others()
        self._runner.begin(self._epoch, step, plan, has_work=has_work, knows_next=knows_next)

    def _end_step(self) -> None:
        """Waits for the first step in flight; commits or abandons it."""
        try:
            result = self._runner.end()
        except StepAbandoned:
            while self._in_flight:
                self._scheduler.abandon(self._in_flight.pop())
            self._steps_abandoned += 1
            self._pads = False
            self._fall_behind()
            return
        self._commit(self._in_flight.popleft(), result)

    def _fall_behind(self) -> None:
        if not self._is_behind:
            self._behind_since = self._clock.now()
        self._is_behind = True

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        self._monitor.beat(())
        committed = self._scheduler.commit(plan, result.ids, result.scores, result.drafts)
        self._steps_committed += 1
        self._scheduler.learn_draws(
            num_rows=result.num_drawn,
            drawn_s=result.drawn_s,
            step_s=self._monitor.timing.step_ms / 1000,
        )
        self._tokens_generated += committed.num_generated
        self._tokens_drafted += committed.num_drafted
        self._drafts_accepted += committed.num_accepted
        self._load = self._read_load()
        self._adoptions.record_commit(
            now=self._clock.now(), num_reprefilled=committed.num_reprefilled
        )
        self._post_tokens(committed.replies)
        self._set_step(self._step + 1)
        self._asleep = not result.any_work
        self._pads = result.all_pad
        self._is_agreed, self._agreed_at = result.all_may_adopt, self._clock.now()
        self._replicator.send_offered()

    def _post_tokens(self, replies: dict[Origin, list[SessionTokens]]) -> None:
        if replies:
            self._post(
                StepTokens(
                    epoch=self._epoch,
                    step=self._step,
                    sessions={origin: tuple(batch) for origin, batch in replies.items()},
                    load=self._load,
                )
            )

    def _set_step(self, step: int) -> None:
        self._step = Step(step)
        self._monitor.epoch = self._epoch
        self._monitor.step = self._step
