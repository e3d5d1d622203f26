"""All sessions of one gateway: places them on ranks, moves them, and gives them their tokens. Pure;
`session_driver` performs its actions."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from gateway.planned_move import MOVES_AT_ONCE
from gateway.rank_choice import RankChooser
from gateway.request_tag import NO_TAG, RequestTag
from gateway.session_state import SessionPolicy, SessionState
from gateway.stream_session import SendToRank, StreamSession
from shared.types import (
    DEFAULT_SCHEDULING,
    Member,
    RankId,
    SamplingParams,
    SchedulingParams,
    SessionId,
)
from shared.wire import Load, SessionTokens


class NotifyReader(NamedTuple):
    """The session has new tokens or has ended: notify its reader. Made for every token, and a tuple
    is made in half the time of a frozen dataclass."""

    session: StreamSession


Action = SendToRank | NotifyReader


class SessionTable:
    """A session leaves the table when it ends; its reader still holds it."""

    def __init__(self, *, rank_chooser: RankChooser, policy: SessionPolicy) -> None:
        self._rank_chooser = rank_chooser
        self._policy = policy
        self._sessions: dict[SessionId, StreamSession] = {}
        self._waiting: dict[SessionId, StreamSession] = {}
        self._placed: dict[Member, dict[SessionId, StreamSession]] = {}
        self._refused_by: dict[SessionId, Member] = {}
        self._vacated: tuple[Member, ...] = ()  # drained; their sessions are to move
        self._moving: dict[SessionId, StreamSession] = {}  # those with a next attempt
        self._generated: Counter[int] = Counter()  # tokens, by rank
        self._expiries: list[tuple[float, SessionId]] = []  # a heap; some have ended already

    @property
    def sessions(self) -> Collection[StreamSession]:
        return self._sessions.values()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def needs_time(self) -> bool:
        """Whether a session waits, or has a deadline."""
        return bool(self._waiting or self._expiries)

    @property
    def generated(self) -> Mapping[int, int]:
        """Tokens of all sessions since the start, by the number of the rank that made them."""
        return self._generated

    def find(self, session: SessionId) -> StreamSession | None:
        """None if it has ended."""
        return self._sessions.get(session)

    def is_on(self, member: Member) -> bool:
        """Whether any session is on that rank."""
        return bool(self._placed.get(member))

    def placed(self) -> Mapping[Member, Collection[StreamSession]]:
        """The sessions on each rank that has any."""
        return {member: sessions.values() for member, sessions in self._placed.items()}

    def wake_at(self) -> float | None:
        """When to call `on_time` next; None if no session waits or has a deadline."""
        while self._expiries and self._expiries[0][1] not in self._sessions:
            heapq.heappop(self._expiries)
        times = [at for at, _ in self._expiries[:1]]
        is_live = bool(self._waiting and self._rank_chooser.live())
        times += [
            min(s.ready_at, s.deadline_at) if is_live else s.deadline_at
            for s in self._waiting.values()
        ]
        return min(times, default=None)

    def open(
        self,
        session: SessionId,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        now: float,
        *,
        scheduling: SchedulingParams = DEFAULT_SCHEDULING,
        expires_at: float = math.inf,
        stream_key: bytes = b"",
        home_rank: RankId | None = None,
        tag: RequestTag = NO_TAG,
    ) -> tuple[StreamSession, list[Action]]:
        assert session not in self._sessions
        opened = StreamSession(
            session=session,
            prompt=prompt,
            sampling=sampling,
            policy=self._policy,
            now=now,
            scheduling=scheduling,
            expires_at=expires_at,
            stream_key=stream_key,
            home_rank=home_rank,
            tag=tag,
        )
        if expires_at < math.inf:
            self._forget_ended_expiries()
            heapq.heappush(self._expiries, (expires_at, session))
        self._sessions[session] = opened
        self._waiting[session] = opened
        return opened, self._place_waiting(now)

    def stop(self, session: StreamSession) -> list[Action]:
        return self._apply(session, session.stop)

    def cancel(self, session: StreamSession) -> list[Action]:
        return self._apply(session, session.cancel)

    def shut_down(self) -> list[Action]:
        """Ranks are told nothing: with the links they lose the sessions, and a client may go on
        with its stream at another gateway."""
        actions: list[Action] = []
        for session in list(self._sessions.values()):
            actions += self._apply(session, session.shut_down)
        return [action for action in actions if not isinstance(action, SendToRank)]

    def on_map(self, members: tuple[Member, ...], now: float) -> list[Action]:
        """Takes the newest map's members. Sessions on ranks that it leaves out are moved."""
        self._rank_chooser.on_map(members)
        left_out = [member for member in self._placed if member not in set(members)]
        return self._move(left_out, now)

    def on_drains(self, draining: frozenset[Member]) -> None:
        """These get no session while another rank can have it."""
        self._rank_chooser.on_drains(draining)

    def vacate(self, members: Collection[Member], now: float) -> list[Action]:
        """The sessions of these drained members, and of no others, are to move to other ranks. They
        do so a few at a time, as tokens and time go on."""
        self._vacated = tuple(members)
        return self._begin_moves(now)

    def on_link_opened(self, member: Member, kv_block_tokens: int, now: float) -> list[Action]:
        self._rank_chooser.on_link_opened(member, kv_block_tokens=kv_block_tokens)
        return self._place_waiting(now)

    def on_link_broken(self, member: Member, now: float) -> list[Action]:
        self._rank_chooser.on_link_broken(member)
        return self._move([member], now)

    def on_standstill(self, member: Member) -> list[Action]:
        """This rank answers probes, but has finished no step for too long."""
        actions: list[Action] = []
        for session in list(self._placed.get(member, {}).values()):
            actions += self._apply(session, lambda s=session: s.on_standstill(member))  # type: ignore[misc]
        return actions

    def on_tokens(
        self, member: Member, messages: Iterable[SessionTokens], load: Load, now: float
    ) -> list[Action]:
        """Takes one frame of a rank: the tokens of one step for all its sessions."""
        actions: list[Action] = []
        num_added = num_generated = 0
        for message in messages:
            session = self._sessions.get(message.session)
            if session is None:
                continue
            if session.extend(member, message, now):
                num_added += len(message.ids)
                num_generated += len(message.ids)
                actions.append(NotifyReader(session))
                continue
            num_generated -= len(session.emitted)
            if message.error is None and message.finish is None:
                num_added += self._apply_tokens(session, member, message, now, actions)
            else:
                actions = _without_notice_of(session, actions)
                actions += self._on_message(session, member, message, now)
            num_generated += len(session.emitted)
        self._generated[member.rank] += num_generated
        self._rank_chooser.add(member, tokens=num_added)
        self._rank_chooser.on_load(member, load)
        if self._waiting:
            actions += self._place_waiting(now)
        if self._vacated:
            actions += self._begin_moves(now)
        return actions

    def on_time(self, now: float) -> list[Action]:
        """Places sessions whose backoff is over, and ends those whose time is over."""
        actions: list[Action] = []
        while self._expiries and self._expiries[0][0] <= now:
            _, expired = heapq.heappop(self._expiries)
            if (late := self._sessions.get(expired)) is not None:
                actions += self._apply(late, lambda s=late: s.on_time(now))  # type: ignore[misc]
        actions += self._place_waiting(now)
        for session in list(self._waiting.values()):
            if now >= session.deadline_at:
                actions += self._apply(session, lambda s=session: s.on_time(now))  # type: ignore[misc]
        return actions

    def _forget_ended_expiries(self) -> None:
        if len(self._expiries) > 64 + 2 * len(self._sessions):
            self._expiries = [entry for entry in self._expiries if entry[1] in self._sessions]
            heapq.heapify(self._expiries)

    def _on_message(
        self, session: StreamSession, member: Member, message: SessionTokens, now: float
    ) -> list[Action]:
        if message.error is not None and message.retryable:
            self._refused_by[session.id] = member
        return self._apply(session, lambda: session.on_tokens(member, message, now))

    def _apply_tokens(
        self,
        session: StreamSession,
        member: Member,
        message: SessionTokens,
        now: float,
        actions: list[Action],
    ) -> int:
        """`_apply` for tokens that do not end the attempt. Adds to `actions`. Returns the number of
        tokens by which a running session has grown."""
        before, attempt = len(session.emitted), session.attempt
        was_there = session.member if session.state is SessionState.RUNNING else None
        sent = session.on_tokens(member, message, now)
        grown = len(session.emitted) - before
        if session.state is not SessionState.RUNNING:
            actions += self._settle(session, was_there, session.num_tokens - grown, [*sent])
            return 0
        actions += sent
        if session.attempt != attempt and was_there is not None:
            self._on_moved(session, was_there, session.num_tokens - grown)
        if grown:
            actions.append(NotifyReader(session))
        return grown

    def _begin_moves(self, now: float) -> list[Action]:
        self._moving = {name: s for name, s in self._moving.items() if s.next is not None}
        actions: list[Action] = []
        for member in self._vacated:
            for session in self._placed.get(member, {}).values():
                if len(self._moving) >= MOVES_AT_ONCE:
                    return actions
                if session.next is None and session.ready_at <= now and session.prompt_is_scored:
                    actions += self._begin_move(session)
        return actions

    def _begin_move(self, session: StreamSession) -> list[Action]:
        target = self._choose(session)
        if target is None or target in self._rank_chooser.draining:
            return []
        self._moving[session.id] = session
        return [*session.prepare_move(target)]

    def _on_moved(self, session: StreamSession, former: Member, num_tokens: int) -> None:
        """It runs on its present member now, and no more on `former`, which was charged with
        `num_tokens`."""
        assert session.member is not None, "it runs"
        del self._placed[former][session.id]
        if not self._placed[former]:
            del self._placed[former]
        self._rank_chooser.add(former, sessions=-1, tokens=-num_tokens)
        self._placed.setdefault(session.member, {})[session.id] = session
        self._rank_chooser.add(session.member, sessions=1, tokens=num_tokens)

    def _move(self, lost: Iterable[Member], now: float) -> list[Action]:
        actions: list[Action] = []
        for member in lost:
            for session in self._moving.values():
                if session.next is not None and session.next.member == member:
                    actions += session.on_rank_lost(member, now)
            for session in list(self._placed.get(member, {}).values()):
                actions += self._apply(
                    session,
                    lambda s=session, m=member: s.on_rank_lost(m, now),  # type: ignore[misc]
                )
        return actions + self._place_waiting(now)

    def _place_waiting(self, now: float) -> list[Action]:
        """Sessions with tokens come first: their clients wait in mid-stream. Then the more urgent:
        a lower priority."""
        if not self._waiting or not self._rank_chooser.live():
            return []
        actions: list[Action] = []
        ready = [s for s in self._waiting.values() if s.ready_at <= now]
        for session in sorted(ready, key=_urgency):
            if (member := self._choose(session)) is not None:
                actions += self._place(session, member, now)
        return actions

    def _choose(self, session: StreamSession) -> Member | None:
        if session.home_rank is not None and session.attempt < 0:
            home = self._rank_chooser.answering(session.home_rank)
            if home is not None:
                return home
        refused_by = self._refused_by.get(session.id)
        return self._rank_chooser.choose(
            session.tokens,
            avoid=(refused_by,) if refused_by else (),
            backup_rank=session.backup_rank,
            cache_salt=session.scheduling.cache_salt,
        )

    def _place(self, session: StreamSession, member: Member, now: float) -> list[Action]:
        del self._waiting[session.id]
        self._placed.setdefault(member, {})[session.id] = session
        self._rank_chooser.add(member, sessions=1, tokens=session.num_tokens)
        return [*session.place(member, now)]

    def _apply(self, session: StreamSession, event: Callable[[], list[SendToRank]]) -> list[Action]:
        """Passes the event to the session and updates the table to the session's new state."""
        if session.id not in self._sessions:
            return []
        member = session.member if session.state is SessionState.RUNNING else None
        num_tokens = session.num_tokens
        return self._settle(session, member, num_tokens, [*event()])

    def _settle(
        self, session: StreamSession, member: Member | None, num_tokens: int, actions: list[Action]
    ) -> list[Action]:
        """Updates the table after an event. The session was on `member`, which was charged with
        `num_tokens`. Adds to `actions` and returns them."""
        if member is not None and session.state is not SessionState.RUNNING:
            placed = self._placed[member]
            del placed[session.id]
            if not placed:
                del self._placed[member]
            self._rank_chooser.add(member, sessions=-1, tokens=-num_tokens)
            if session.state is SessionState.WAITING:
                self._waiting[session.id] = session
        if session.ended:
            del self._sessions[session.id]
            self._waiting.pop(session.id, None)
            self._refused_by.pop(session.id, None)
            actions.append(NotifyReader(session))
        return actions


def _urgency(session: StreamSession) -> tuple[bool, int, float]:
    return (not session.emitted, session.scheduling.priority, session.opened_at)


def _without_notice_of(session: StreamSession, actions: list[Action]) -> list[Action]:
    """A session whose tokens and end come in one frame is reported once, by its end."""
    return [a for a in actions if not (isinstance(a, NotifyReader) and a.session is session)]
