"""Passes events of the links, etcd and the clock to the session table, and performs its actions:
messages to ranks, notifications of readers, suspicions. It decides nothing about a session."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog

from gateway.cluster_view import ClusterView
from gateway.drains import Drains
from gateway.metrics import GatewayMetrics
from gateway.progress_watch import ProgressWatch
from gateway.rank_choice import RankChooser
from gateway.rank_link import LinkEvents, RankLink
from gateway.request_tag import NO_TAG, RequestTag
from gateway.routing_policy import RoutingPolicy
from gateway.session_state import SessionPolicy
from gateway.session_table import Action, NotifyReader, SessionTable
from gateway.session_trace import trace_end, trace_placement
from gateway.stream_session import SendToRank, StreamSession
from gateway.tenants_in_flight import TenantsInFlight
from gateway.vllm_metrics import RankGauges, gauges_of
from shared.clock import Clock
from shared.codec import pack
from shared.handshake import Access, Caller
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import RankRecord, Suspicion
from shared.types import (
    DEFAULT_SCHEDULING,
    Accuser,
    Member,
    RankId,
    SamplingParams,
    SchedulingParams,
    SessionId,
    Step,
    SuspicionReason,
)
from shared.wire import Load, Pong, Submit, Tokens

log = structlog.get_logger()

LOOK_S = 0.025
PROBE_SERVING_S = 0.025
"""A rank that works for sessions of ours and says nothing for so long is probed."""
PROBE_BUSY_S = 0.1
"""The same for the others, while there are sessions."""
PROBE_IDLE_S = 1.0
SILENCE_S = 0.3
"""A rank that leaves a probe unanswered for this long gets no new sessions and a suspicion."""
ANSWERED_S = 1.5 * PROBE_BUSY_S
"""By then whoever can has answered a probe, and one round of them has passed. Who has not may be
out of reach."""
OWN_PAUSE_S = 0.05
"""Answers may be unread if this process has not looked for so long."""
LOGGED_MOVES_MAX = 64
"""Sessions that one log line names: thousands may move at once, and they must not wait for it."""


class SessionDriver:
    """All methods run on the event loop. The caller's name prefixes session ids, so no gateway may
    ever have used it before."""

    def __init__(
        self,
        *,
        caller: Caller,
        access: Access,
        clock: Clock,
        keys: Keys,
        leased: LeasedKeys,
        metrics: GatewayMetrics,
        policy: SessionPolicy,
        routing: RoutingPolicy,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._name = caller.name
        self._caller = caller
        self._access = access
        self._clock = clock
        self._keys = keys
        self._leased = leased
        self._metrics = metrics
        self._tasks = tasks
        self._rank_chooser = RankChooser(routing)
        self._table = SessionTable(rank_chooser=self._rank_chooser, policy=policy)
        self._links: dict[Member, tuple[RankLink, asyncio.Task[None]]] = {}
        self._view = ClusterView()
        self._drains = Drains()
        self._fenced: set[Member] = set()
        self._suspected: set[tuple[Member, SuspicionReason]] = set()
        self._wakers: dict[SessionId, Callable[[StreamSession], None]] = {}
        self._grown: dict[SessionId, StreamSession] = {}  # whose readers do not know it yet
        self._numbers = itertools.count(1)
        self._tenants = TenantsInFlight()
        self._progress = ProgressWatch()
        self._stall_timeout_s = policy.no_rank_timeout_s
        self._lost_at: dict[Member, float] = {}  # members of the map whose link is broken
        self._late: set[Member] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._will_set_timer = False
        self._closed = False
        self._ended = asyncio.Event()

    @property
    def view(self) -> ClusterView:
        return self._view

    @property
    def num_sessions(self) -> int:
        return len(self._table.sessions)

    @property
    def num_waiting(self) -> int:
        """Sessions that wait for a rank."""
        return self._table.num_waiting

    @property
    def generated(self) -> Mapping[int, int]:
        """Tokens of all sessions since the start, by the rank that made them."""
        return self._table.generated

    def rank_gauges(self) -> dict[int, RankGauges]:
        """By rank, of the live ones."""
        placed = self._table.placed()
        return {
            member.rank: gauges_of(self._rank_chooser.load_of(member), placed.get(member, ()))
            for member in self.live_ranks()
        }

    @property
    def kv_replicas_rejected(self) -> int:
        """See `Load`: on all ranks."""
        return self._rank_chooser.kv_replicas_rejected

    @property
    def is_congested(self) -> bool:
        """Whether a rank has not read much of what was sent to it."""
        return any(link.is_congested for link, _ in self._links.values())

    def serves_others(self, client: str) -> bool:
        """Whether a tenant with a name, other than this client, has sessions in flight."""
        return any(tenant not in ("", client) for tenant in self._tenants.named)

    def live_ranks(self) -> list[Member]:
        return self._rank_chooser.live()

    def stragglers(self) -> Mapping[Member, float]:
        """The live ranks that hold the others up, with the ms by which they are late."""
        return self._rank_chooser.stragglers()

    def loads(self) -> list[Load]:
        """What the live ranks last reported."""
        return self._rank_chooser.loads()

    def draining_ranks(self) -> frozenset[Member]:
        """Members of the map that get no sessions because they are to leave it. They are live."""
        return self._drains.members

    def lost_ranks(self) -> dict[Member, float]:
        """The members of the map whose links are broken, with the time when each broke."""
        return {m: at for m, at in self._lost_at.items() if m in self._view.members}

    def stalled_ranks(self, after_s: float) -> dict[Member, float]:
        """The live ranks that have work and have finished no step for so long, with the time of
        the last one."""
        now = self._clock.now()
        progress = self._progress
        return {
            member: since
            for member in self.live_ranks()
            if (since := progress.stands_still_since(member, now, after_s=after_s)) is not None
        }

    def open(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        wake: Callable[[StreamSession], None],
        *,
        scheduling: SchedulingParams = DEFAULT_SCHEDULING,
        expires_at: float = math.inf,
        stream_key: bytes = b"",
        home_rank: RankId | None = None,
        tag: RequestTag = NO_TAG,
    ) -> StreamSession:
        """`wake` is called whenever the session has new tokens, and when it has ended. At
        `expires_at` (of the clock's `now`) it fails. `stream_key` as in `Submit`; `home_rank` may
        have it already, from another gateway. The caller must `cancel` the session at the end; that
        does nothing if it has already ended."""
        session_id = SessionId(f"{self._name}/{next(self._numbers)}")
        self._wakers[session_id] = wake
        self._metrics.on_session_begin(len(prompt))
        if self._tenants.begin(scheduling.tenant):
            self._tell_tenants()
        session, actions = self._table.open(
            session_id,
            prompt,
            sampling,
            self._clock.now(),
            scheduling=scheduling,
            expires_at=expires_at,
            stream_key=stream_key,
            home_rank=home_rank,
            tag=tag,
        )
        self._perform(actions)
        return session

    def stop(self, session: StreamSession) -> None:
        self._perform(self._table.stop(session))

    def cancel(self, session: StreamSession) -> None:
        self._perform(self._table.cancel(session))

    def shut_down(self) -> None:
        """Fails every remaining session; each client gets an error."""
        self._perform(self._table.shut_down())

    def close(self) -> None:
        """Closes every link. Ranks then drop the sessions that they still run for this gateway."""
        for _, task in self._links.values():
            task.cancel()
        self._links.clear()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    async def wait_until_idle(self) -> None:
        while self._table.sessions:
            self._ended.clear()
            await self._ended.wait()

    def on_view(self, view: ClusterView) -> None:
        old, self._view = self._view, view
        self._drains.on_view(view, now=self._clock.now(), wall=self._clock.wall())
        self._table.on_drains(self._drains.members)
        self._vacate_due()
        if view.epoch != old.epoch:
            self._on_map(old, view)
        self._reconcile_links()

    async def run_probes(self) -> None:
        """Probes every rank at intervals, which are shorter while there are sessions."""
        while True:
            if not self._table.sessions:
                await asyncio.sleep(PROBE_IDLE_S)
                self._look_around()
            for _ in range(round(PROBE_BUSY_S / LOOK_S)):
                before = self._clock.now()
                await asyncio.sleep(LOOK_S)
                if self._clock.now() - before <= LOOK_S + OWN_PAUSE_S:
                    self._probe_links()
            self._look_around()

    def _probe_links(self) -> None:
        silent: list[tuple[RankLink, float]] = []
        is_urgent = self._progress.has_silent
        for link, _ in self._links.values():
            is_soon = is_urgent or self._table.is_on(link.member)
            silent_s = link.probe(PROBE_SERVING_S if is_soon else PROBE_BUSY_S)
            if silent_s >= ANSWERED_S:
                silent.append((link, silent_s))
        self._progress.on_silent(link.member for link, _ in silent)
        for link, silent_s in silent:
            self._on_silence(link, silent_s)

    def _look_around(self) -> None:
        self._vacate_due()
        if self._tenants.forget_gone():
            self._tell_tenants()
        self._log_stragglers()
        for member in self.stalled_ranks(self._stall_timeout_s):
            self._perform(self._table.on_standstill(member))

    def _tell_tenants(self) -> None:
        for link, _ in self._links.values():
            link.tell_tenants(self._tenants.named)

    def _vacate_due(self) -> None:
        """Called often enough for grace times of seconds."""
        now = self._clock.now()
        self._perform(self._table.vacate(self._drains.due(now), now))

    def _log_stragglers(self) -> None:
        late = self.stragglers()
        for member in late.keys() - self._late:
            log.warning("rank_straggles", rank=member.rank, late_ms=round(late[member], 1))
        self._late = set(late)

    def _on_map(self, old: ClusterView, view: ClusterView) -> None:
        log.info("map_received", epoch=view.epoch, members=[str(m) for m in view.members])
        # A member that a map leaves out stays fenced; its rank returns as a new incarnation.
        self._fenced |= set(old.members) - set(view.members)
        self._perform(self._table.on_map(view.members, self._clock.now()))

    def _reconcile_links(self) -> None:
        """Keeps a link to every registered incarnation, so that it is open before a map names it,
        and to every member that was once registered: a lost lease is only a suspicion."""
        records = {r.member: r for r in self._view.ranks.values() if r.member not in self._fenced}
        members = set(self._view.members)
        for member, record in records.items():
            if member not in self._links:
                self._open_link(record)
        for member in [m for m in self._links if m not in records and m not in members]:
            self._close_link(member)
        self._fenced &= {r.member for r in self._view.ranks.values()} | members

    def _open_link(self, record: RankRecord) -> None:
        events = LinkEvents(
            opened=self._on_opened,
            tokens=self._on_tokens,
            pong=self._on_pong,
            broken=self._on_broken,
        )
        link = RankLink(
            record=record,
            caller=self._caller,
            access=self._access,
            events=events,
            clock=self._clock,
        )
        link.tell_tenants(self._tenants.named)
        self._links[record.member] = (link, self._tasks.create_task(link.run()))

    def _close_link(self, member: Member) -> None:
        _, task = self._links.pop(member)
        task.cancel()
        self._clear_suspicion(member)
        self._perform(self._table.on_link_broken(member, self._clock.now()))
        self._rank_chooser.forget(member)
        self._progress.forget(member)
        self._lost_at.pop(member, None)

    def _on_opened(self, record: RankRecord) -> None:
        member = record.member
        log.info("rank_linked", rank=member.rank, incarnation=member.incarnation)
        self._clear_suspicion(member)
        self._lost_at.pop(member, None)
        now = self._clock.now()
        self._perform(self._table.on_link_opened(member, record.kv_block_tokens, now))

    def _on_broken(self, member: Member, reason: SuspicionReason, detail: str) -> None:
        if member not in self._links:
            return
        self._suspect(member, reason, detail)
        now = self._clock.now()
        self._lost_at.setdefault(member, now)
        self._progress.forget(member)
        self._perform(self._table.on_link_broken(member, now))

    def _on_tokens(self, member: Member, frame: Tokens) -> None:
        self._mark_responsive(member)
        now = self._clock.now()
        self._progress.on_report(member, frame.epoch, frame.step, frame.load, now)
        self._perform(self._table.on_tokens(member, frame.sessions, frame.load, now))

    def _on_pong(self, member: Member, pong: Pong) -> None:
        self._mark_responsive(member)
        self._rank_chooser.on_load(member, pong.load)
        self._progress.on_report(member, pong.epoch, pong.step, pong.load, self._clock.now())

    def _on_silence(self, link: RankLink, silent_s: float) -> None:
        """No verdict will come on a rank that others hear: its sessions go elsewhere at once."""
        if silent_s > SILENCE_S:
            self._rank_chooser.on_silence(link.member, silent=True)
            self._suspect(link.member, SuspicionReason.SILENCE, "a probe has no answer")
        if self._progress.is_left_behind(link.member):
            log.warning("rank_unreachable", rank=link.member.rank)
            link.abort()

    def _mark_responsive(self, member: Member) -> None:
        if (member, SuspicionReason.SILENCE) in self._suspected:
            self._rank_chooser.on_silence(member, silent=False)
            self._clear_suspicion(member)

    def _suspect(self, member: Member, reason: SuspicionReason, detail: str) -> None:
        """Reports a suspicion once per incarnation and reason, until the rank responds again. A
        rank that the map does not name needs none."""
        if (member, reason) in self._suspected or member not in self._view.members:
            return
        self._suspected.add((member, reason))
        heard_at = self._links[member][0].heard_at
        self._metrics.on_suspicion(reason, self._clock.now() - heard_at)
        log.warning("rank_suspected", rank=member.rank, reason=reason.value, detail=detail)
        suspicion = Suspicion(
            rank=member.rank,
            incarnation=member.incarnation,
            by=self._name,
            reason=reason,
            epoch=self._view.epoch,
            step=Step(0),
            raised_at=self._clock.now(),
            detail=detail,
        )
        self._leased.put(self._suspicion_key(member), pack(suspicion))

    def _clear_suspicion(self, member: Member) -> None:
        held = {entry for entry in self._suspected if entry[0] == member}
        if held:
            self._suspected -= held
            self._leased.delete(self._suspicion_key(member))

    def _suspicion_key(self, member: Member) -> str:
        return self._keys.suspicion(member.rank, member.incarnation, Accuser.GATEWAY, self._name)

    def _perform(self, actions: Iterable[Action]) -> None:
        moved: list[SendToRank] = []
        for action in actions:
            if isinstance(action, NotifyReader):
                if action.session.ended:
                    self._report_end(action.session)
                else:
                    self._on_grown(action.session)
                continue
            if (entry := self._links.get(action.member)) is not None:
                entry[0].send(action.message)
            if isinstance(action.message, Submit) and self._report_placement(
                action.member, action.message
            ):
                moved.append(action)
        if moved:
            log_moves(moved)
        if not self._will_set_timer and (self._table.needs_time or self._timer is not None):
            # Once for all that this turn of the loop brings: it looks at every session that waits,
            # and a client that leaves may end hundreds.
            self._will_set_timer = True
            asyncio.get_running_loop().call_soon(self._set_timer)

    def _report_placement(self, member: Member, submit: Submit) -> bool:
        """Whether the session was on another rank, which is lost."""
        if not submit.attempt:
            self._metrics.on_first_placed(member.rank, len(submit.tokens))
        session = self._table.find(submit.session)
        if session is None:
            return False
        if session.tag.span is not None:
            trace_placement(session.tag.span, member.rank, submit)
        return session.has_lost_rank

    def _on_grown(self, session: StreamSession) -> None:
        self._metrics.on_tokens(session)
        if not self._grown:
            asyncio.get_running_loop().call_soon(self._wake_grown)
        self._grown[session.id] = session

    def _wake_grown(self) -> None:
        """Once for all frames that have arrived by now: of a gateway that is late, its clients get
        the tokens of several steps in one write."""
        grown, self._grown = self._grown, {}
        for name, session in grown.items():
            if (wake := self._wakers.get(name)) is not None:
                wake(session)

    def _report_end(self, session: StreamSession) -> None:
        wake = self._wakers.pop(session.id)
        self._metrics.on_session_end(session)
        self._tenants.end(session.scheduling.tenant)
        if session.tag.span is not None:
            trace_end(session.tag.span, session)
        if session.failure is not None:
            log.info(
                "session_failed",
                request_id=session.tag.request_id,
                session=session.id,
                reason=session.failure.kind.value,
                detail=session.failure.message,
                attempt=session.attempt,
                generated_tokens=len(session.emitted),
            )
        self._ended.set()
        wake(session)

    def _set_timer(self) -> None:
        self._will_set_timer = False
        if self._closed:
            return
        wake_at = self._table.wake_at()
        if wake_at == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, wake_at
        if wake_at is not None:
            delay_s = max(0.0, wake_at - self._clock.now())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = self._timer_at = None
        self._perform(self._table.on_time(self._clock.now()))


def log_moves(moved: Sequence[SendToRank]) -> None:
    """After they were sent."""
    submits = [a.message for a in moved[:LOGGED_MOVES_MAX] if isinstance(a.message, Submit)]
    log.info(
        "sessions_moved",
        number=len(moved),
        ranks=sorted({action.member.rank for action in moved}),
        request_ids=sorted({submit.request_id for submit in submits}),
    )
