"""Sessions on ranks that come, go, and send repeated and late messages: clients see the reference
stream, and every session ends with a result."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.rank_choice import RankChooser
from gateway.session_state import FailureKind, SessionPolicy, SessionState
from gateway.session_table import Action, NotifyReader, SessionTable
from gateway.stream_session import SendToRank, StreamSession
from shared.types import (
    FinishReason,
    Incarnation,
    Member,
    RankId,
    SamplingParams,
    SchedulingParams,
    SessionId,
)
from shared.wire import Cancel, Load, SessionTokens, Submit

LOAD = Load(running=0, waiting=0, tokens=0, kv_blocks_free=100, kv_blocks=100)
BLOCK = 16


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def new_table(*linked: Member, policy: SessionPolicy | None = None) -> SessionTable:
    table = SessionTable(rank_chooser=RankChooser(), policy=policy or SessionPolicy())
    table.on_map(linked, 0.0)
    for each in linked:
        table.on_link_opened(each, BLOCK, 0.0)
    return table


def submits(actions: list[Action]) -> list[tuple[Member, Submit]]:
    return [
        (a.member, a.message)
        for a in actions
        if isinstance(a, SendToRank) and isinstance(a.message, Submit)
    ]


def open_one(
    table: SessionTable, name: str = "s", max_tokens: int = 8, now: float = 0.0
) -> tuple[StreamSession, list[Action]]:
    return table.open(SessionId(name), (1, 2), SamplingParams(max_tokens=max_tokens), now)


def frame(submit: Submit, index: int, *ids: int, **fields: object) -> SessionTokens:
    return SessionTokens(
        session=submit.session,
        attempt=submit.attempt,
        index=index,
        ids=ids,
        **fields,  # type: ignore[arg-type]
    )


def test_a_session_is_placed_at_once_where_a_rank_lives() -> None:
    _, actions = open_one(new_table(member(0)))
    assert [m for m, _ in submits(actions)] == [member(0)]


def test_tokens_and_the_end_of_a_session_in_one_frame_are_reported_once() -> None:
    table = new_table(member(0))
    session, actions = open_one(table)
    ((_, submit),) = submits(actions)
    messages = [frame(submit, 0, 5), frame(submit, 1, 6, finish=FinishReason.STOP)]
    assert table.on_tokens(member(0), messages, LOAD, 1.0) == [NotifyReader(session=session)]
    assert (list(session.emitted), session.ended) == ([5, 6], True)


def test_a_rank_must_be_both_linked_and_in_the_map() -> None:
    table = SessionTable(rank_chooser=RankChooser(), policy=SessionPolicy())
    _, actions = open_one(table)
    actions += table.on_link_opened(member(0), BLOCK, 0.0)
    assert submits(actions) == []
    assert [m for m, _ in submits(table.on_map((member(0),), 0.0))] == [member(0)]


def test_a_broken_link_moves_its_sessions_in_the_same_call() -> None:
    table = new_table(member(0), member(1))
    session, actions = open_one(table)
    ((first, submit),) = submits(actions)
    table.on_tokens(first, [frame(submit, 0, 5)], LOAD, 1.0)
    ((second, again),) = submits(table.on_link_broken(first, 1.0))
    assert second != first
    assert (again.tokens, again.num_emitted, again.attempt) == ((1, 2, 5), 1, 1)
    assert session.member == second


def test_a_new_incarnation_of_the_rank_is_another_member() -> None:
    table = new_table(member(0))
    open_one(table)
    assert submits(table.on_map((member(0, 2),), 1.0)) == []
    assert [m for m, _ in submits(table.on_link_opened(member(0, 2), BLOCK, 1.0))] == [member(0, 2)]


def test_those_in_mid_stream_are_placed_before_new_ones() -> None:
    table = new_table(member(0))
    _, actions = open_one(table, "old")
    table.on_tokens(member(0), [frame(submits(actions)[0][1], 0, 5)], LOAD, 1.0)
    table.on_link_broken(member(0), 1.0)
    open_one(table, "new", now=0.5)
    placed = submits(table.on_link_opened(member(0), BLOCK, 2.0))
    assert [s.session for _, s in placed] == ["old", "new"]


def test_a_refusal_goes_to_another_rank_after_the_backoff() -> None:
    table = new_table(member(0), member(1))
    session, actions = open_one(table)
    ((first, submit),) = submits(actions)
    refusal = frame(submit, 0, error="full", retryable=True)
    assert submits(table.on_tokens(first, [refusal], LOAD, 1.0)) == []
    wake_at = table.wake_at()
    assert wake_at == session.ready_at > 1.0
    ((second, _),) = submits(table.on_time(wake_at))
    assert second != first


def test_without_a_rank_the_session_fails_at_its_deadline_and_its_reader_is_told() -> None:
    table = new_table(policy=SessionPolicy(no_rank_timeout_s=5))
    session, _ = open_one(table)
    assert table.wake_at() == 5.0
    assert table.on_time(5.0) == [NotifyReader(session=session)]
    assert session.failure is not None
    assert session.failure.kind is FailureKind.NO_RANK
    assert table.wake_at() is None


def test_an_ended_session_leaves_no_trace() -> None:
    table = new_table(member(0))
    session, actions = open_one(table)
    ((_, submit),) = submits(actions)
    done = frame(submit, 0, 5, finish=FinishReason.STOP)
    assert table.on_tokens(member(0), [done], LOAD, 1.0) == [NotifyReader(session=session)]
    assert table.on_tokens(member(0), [frame(submit, 1, 6)], LOAD, 1.0) == []
    assert (len(table.sessions), table.cancel(session)) == (0, [])
    assert session.emitted == [5]


def test_cancelling_tells_the_rank() -> None:
    table = new_table(member(0))
    session, _ = open_one(table)
    sent = [a.message for a in table.cancel(session) if isinstance(a, SendToRank)]
    assert [type(message) for message in sent] == [Cancel]


def test_a_shutdown_fails_every_session_with_a_reason() -> None:
    table = new_table(member(0))
    sessions = [open_one(table, str(n))[0] for n in range(3)]
    looks = [a for a in table.shut_down() if isinstance(a, NotifyReader)]
    assert [look.session for look in looks] == sessions
    assert all(s.failure and s.failure.kind is FailureKind.SHUTDOWN for s in sessions)


def open_timed(table: SessionTable, name: str, expires_at: float) -> StreamSession:
    sampling = SamplingParams(max_tokens=8)
    session, _ = table.open(SessionId(name), (1, 2), sampling, 0.0, expires_at=expires_at)
    return session


def test_a_session_that_is_late_fails_wherever_it_is_and_leaves_its_rank() -> None:
    table = new_table(member(0))
    running = open_timed(table, "running", 5.0)
    later = open_timed(table, "later", 9.0)
    assert table.wake_at() == 5.0
    actions = table.on_time(5.0)
    assert NotifyReader(session=running) in actions
    sent = [a.message for a in actions if isinstance(a, SendToRank)]
    assert [type(message) for message in sent] == [Cancel]
    assert running.failure is not None
    assert running.failure.kind is FailureKind.DEADLINE
    assert (later.state, table.wake_at()) == (SessionState.RUNNING, 9.0)


def test_a_deadline_outlives_a_move() -> None:
    table = new_table(member(0))
    session = open_timed(table, "s", 5.0)
    states = [session.state]
    for happen in (
        lambda: table.on_link_broken(member(0), 1.0),
        lambda: table.on_link_opened(member(0), BLOCK, 2.0),
        lambda: table.on_time(4.9),
        lambda: table.on_time(5.0),
    ):
        happen()
        states.append(session.state)
    running, waiting = SessionState.RUNNING, SessionState.WAITING
    assert states == [running, waiting, running, running, SessionState.FAILED]


def test_the_earlier_of_two_ends_counts_for_a_waiting_session() -> None:
    table = new_table(policy=SessionPolicy(no_rank_timeout_s=5))
    session = open_timed(table, "s", 3.0)
    assert table.wake_at() == 3.0
    table.on_time(3.0)
    assert session.failure is not None
    assert session.failure.kind is FailureKind.DEADLINE


def test_deadlines_of_ended_sessions_are_forgotten() -> None:
    table = new_table(member(0))
    first = open_timed(table, "first", 1000.0)
    for number in range(1000):
        table.cancel(open_timed(table, str(number), 1.0 + number))
    assert table.wake_at() == 1000.0
    assert len(table._expiries) < 100
    table.cancel(first)
    assert table.wake_at() is None
    assert not table.needs_time


def test_the_more_urgent_are_placed_first_and_those_in_mid_stream_before_them() -> None:
    table = new_table(member(0))
    _, actions = open_one(table, "old")
    table.on_tokens(member(0), [frame(submits(actions)[0][1], 0, 5)], LOAD, 1.0)
    table.on_link_broken(member(0), 1.0)
    for name, priority in (("plain", 0), ("urgent", -1)):
        scheduling = SchedulingParams(priority=priority)
        table.open(SessionId(name), (1,), SamplingParams(), 2.0, scheduling=scheduling)
    placed = submits(table.on_link_opened(member(0), BLOCK, 3.0))
    assert [s.session for _, s in placed] == ["old", "urgent", "plain"]


def test_every_attempt_carries_the_same_scheduling() -> None:
    table = new_table(member(0), member(1))
    scheduling = SchedulingParams(
        tenant="t", weight=2.0, priority=-3, deadline_at=1e9, cache_salt=b"s" * 32
    )
    sampling = SamplingParams(max_tokens=8)
    _, actions = table.open(SessionId("s"), (1, 2), sampling, 0.0, scheduling=scheduling)
    ((first, one),) = submits(actions)
    ((_, two),) = submits(table.on_link_broken(first, 1.0))
    assert one.scheduling == two.scheduling == scheduling
    assert (one.attempt, two.attempt) == (0, 1)


@pytest.mark.parametrize(("client", "rank"), [(b"a", 0), (b"b", 1), (b"", 1)])
def test_a_prompt_goes_where_its_own_client_has_sent_it(client: bytes, rank: int) -> None:
    """And not where another client has: the choice would tell."""
    table = new_table(member(0), member(1))

    def place(name: str, prompt: tuple[int, ...], salt: bytes) -> tuple[StreamSession, Member]:
        scheduling = SchedulingParams(cache_salt=salt)
        sampling = SamplingParams(max_tokens=8)
        session, actions = table.open(SessionId(name), prompt, sampling, 0.0, scheduling=scheduling)
        return session, submits(actions)[0][0]

    long = tuple(range(200))
    first, served_by = place("first", long, b"a" * 32)
    table.cancel(first)
    _, busy = place("busy", (1,), b"")
    assert busy == served_by == member(0)
    assert place("second", long, client * 32)[1] == member(rank)


def open_long(table: SessionTable, num_tokens: int = 64) -> tuple[Member, Submit]:
    prompt = tuple(range(num_tokens))
    _, actions = table.open(SessionId("s"), prompt, SamplingParams(max_tokens=1000), 0.0)
    ((placed, submit),) = submits(actions)
    return placed, submit


def test_a_session_moves_to_the_last_reported_backup_rank() -> None:
    table = new_table(*(member(rank) for rank in range(4)))
    first, submit = open_long(table)
    assert first == member(0)
    table.on_tokens(first, [frame(submit, 0, 5, backup_rank=2)], LOAD, 1.0)
    table.on_tokens(first, [frame(submit, 1, 6, backup_rank=3)], LOAD, 1.0)
    table.on_tokens(first, [frame(submit, 2, 7)], LOAD, 1.0)
    assert [m for m, _ in submits(table.on_link_broken(first, 2.0))] == [member(3)]


def test_a_backup_rank_of_a_left_attempt_does_not_count() -> None:
    table = new_table(*(member(rank) for rank in range(4)))
    first, submit = open_long(table)
    ((second, again),) = submits(table.on_link_broken(first, 1.0))
    table.on_tokens(second, [frame(again, 0, 5, backup_rank=3)], LOAD, 2.0)
    table.on_tokens(first, [frame(submit, 0, 5, backup_rank=2)], LOAD, 2.0)
    assert [m for m, _ in submits(table.on_link_broken(second, 2.0))] == [member(3)]


def test_kv_replicas_of_an_earlier_attempt_do_not_attract_a_session() -> None:
    """Its rank is gone, and nobody knows how long the replicas are kept."""
    table = new_table(*(member(rank) for rank in range(4)))
    first, submit = open_long(table)
    busy = Load(running=9, waiting=0, tokens=9000, kv_blocks_free=100, kv_blocks=100)
    table.on_tokens(first, [frame(submit, 0, 5, backup_rank=3)], LOAD, 1.0)
    table.on_tokens(member(3), [], busy, 1.0)
    ((second, _),) = submits(table.on_link_broken(first, 2.0))
    assert second == member(1)
    table.on_tokens(member(3), [], LOAD, 2.0)
    assert [m for m, _ in submits(table.on_link_broken(second, 2.0))] == [member(2)]


def test_a_continuation_needs_room_for_what_was_emitted_too() -> None:
    table = new_table(*(member(rank) for rank in range(3)))
    first, submit = open_long(table, num_tokens=16)
    table.on_tokens(first, [frame(submit, 0, *range(40))], LOAD, 1.0)
    short = Load(running=0, waiting=0, tokens=0, kv_blocks_free=2, kv_blocks=100)
    table.on_tokens(member(1), [], short, 1.0)
    assert [m for m, _ in submits(table.on_link_broken(first, 2.0))] == [member(2)]


def reference(submit: Submit, index: int) -> int:
    """The token that every rank gives a session at an index: a function of the tokens so far."""
    prompt = submit.tokens[: len(submit.tokens) - submit.num_emitted]
    return (sum(prompt) * 31 + index * 7) % 1000


class UnreliableCluster:
    """Ranks that send their sessions' tokens in pieces, twice, late, and after the session has
    left."""

    def __init__(self, seed: int, num_ranks: int, lengths: list[int]) -> None:
        self.random = random.Random(seed)
        policy = SessionPolicy(no_rank_timeout_s=1e6, losses_max=10**6, refusals_max=10**6)
        self.table = SessionTable(rank_chooser=RankChooser(), policy=policy)
        self.now = 0.0
        self.live = dict.fromkeys(range(num_ranks), 1)  # incarnation by rank
        self.linked: set[Member] = set()
        self.running: list[tuple[Member, Submit, int]] = []  # and the next index there
        self.on_the_way: deque[tuple[Member, SessionTokens]] = deque()
        self.publish()
        self.sessions: list[StreamSession] = []
        for number, length in enumerate(lengths):
            sampling = SamplingParams(max_tokens=length)
            prompt = (number, number + 1)
            session, actions = self.table.open(SessionId(str(number)), prompt, sampling, self.now)
            self.sessions.append(session)
            self.perform(actions)

    def perform(self, actions: list[Action]) -> None:
        for to, submit in submits(actions):
            assert to in self.linked
            self.running.append((to, submit, submit.num_emitted))

    def publish(self) -> None:
        members = tuple(member(rank, life) for rank, life in self.live.items())
        self.perform(self.table.on_map(members, self.now))
        for each in members:
            if each not in self.linked:
                self.linked.add(each)
                self.perform(self.table.on_link_opened(each, BLOCK, self.now))

    def step(self) -> None:
        self.now += self.random.random()
        often = [self.generate, self.deliver]
        self.random.choice([*often, *often, self.kill, self.refuse, self.drain])()
        self.perform(self.table.on_time(self.now))

    def generate(self) -> None:
        if not self.running:
            return
        place = self.random.randrange(len(self.running))
        to, submit, index = self.running[place]
        count = min(self.random.randint(1, 3), submit.sampling.max_tokens - index)
        start = max(0, index - self.random.choice([0, 0, 1, 2]))
        ids = [reference(submit, i) for i in range(start, index + count)]
        ended = index + count == submit.sampling.max_tokens
        message = frame(submit, start, *ids, finish=FinishReason.LENGTH if ended else None)
        self.on_the_way.extend([(to, message)] * self.random.choice([1, 1, 2]))
        if ended:
            del self.running[place]
        else:
            self.running[place] = (to, submit, index + count)

    def deliver(self) -> None:
        """Delivers in order, like a connection. Messages in flight may be delivered again much
        later."""
        if not self.on_the_way:
            return
        to, message = self.on_the_way.popleft()
        if self.random.random() < 0.1:
            self.on_the_way.append((to, message))
        self.perform(self.table.on_tokens(to, [message], LOAD, self.now))

    def refuse(self) -> None:
        if self.running:
            to, submit, index = self.running.pop(self.random.randrange(len(self.running)))
            self.on_the_way.append((to, frame(submit, index, error="full", retryable=True)))

    def drain(self) -> None:
        """Other ranks are drained than before, or none; their sessions move at once, or go on."""
        members = [member(rank, life) for rank, life in self.live.items()]
        drained = self.random.sample(members, self.random.randint(0, len(members)))
        self.table.on_drains(frozenset(drained))
        vacated = drained[: self.random.randint(0, len(drained))]
        self.perform(self.table.vacate(vacated, self.now))

    def kill(self) -> None:
        """Loses a rank through a broken link, a map, or both in either order. It may go on
        sending."""
        rank = self.random.choice(list(self.live))
        old = member(rank, self.live[rank])
        if self.random.random() < 0.5 and old in self.linked:
            self.linked.discard(old)
            self.perform(self.table.on_link_broken(old, self.now))
        if self.random.random() < 0.7:
            self.live[rank] += 1
            self.publish()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_ranks=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
)
def test_any_interleaving_gives_every_client_exactly_the_reference_stream(
    seed: int, num_ranks: int, lengths: list[int]
) -> None:
    cluster = UnreliableCluster(seed, num_ranks, lengths)
    for _ in range(150):
        cluster.step()
        for session in cluster.sessions:
            probe = Submit(
                session=session.id,
                attempt=session.attempt,
                tokens=session.prompt,
                num_emitted=0,
                sampling=session.sampling,
            )
            wanted = [reference(probe, i) for i in range(len(session.emitted))]
            assert session.emitted == wanted
    for rank in cluster.live:
        cluster.live[rank] += 1
    cluster.publish()
    for _ in range(2000):
        if all(session.ended for session in cluster.sessions):
            break
        cluster.now += 10
        cluster.perform(cluster.table.on_time(cluster.now))
        cluster.generate()
        cluster.deliver()
    assert all(s.state is SessionState.FINISHED for s in cluster.sessions)
    assert [len(s.emitted) for s in cluster.sessions] == lengths
    assert not cluster.table.sessions
