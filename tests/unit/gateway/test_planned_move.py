"""Sessions that leave a drained rank: the client's tokens are those of one attempt at a time, no
token waits for a prefill, and whatever fails on the way changes nothing."""

from __future__ import annotations

from collections import deque

import pytest

from gateway.planned_move import MOVES_AT_ONCE, RENEWALS_MAX, RETRY_S, NextAttempt, Readiness
from gateway.rank_choice import RankChooser
from gateway.session_state import SessionPolicy, SessionState
from gateway.session_table import Action, SessionTable
from gateway.stream_session import SendToRank, StreamSession
from shared.types import (
    Attempt,
    FinishReason,
    Incarnation,
    Member,
    RankId,
    SamplingParams,
    SessionId,
)
from shared.wire import Cancel, Load, SessionTokens, Submit

A, B, C = (Member(rank=RankId(rank), incarnation=Incarnation(1)) for rank in range(3))
LOAD = Load(running=0, waiting=0, tokens=0, kv_blocks_free=100, kv_blocks=100)
EMITTED = [10, 11, 12, 13, 14]


def message(index: int, *ids: int, attempt: int = 1, **fields: object) -> SessionTokens:
    return SessionTokens(
        session=SessionId("s"),
        attempt=Attempt(attempt),
        index=index,
        ids=ids,
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("said", "judged"),
    [
        (message(1, 11), Readiness.LAGS),
        (message(2, 12), Readiness.READY),
        (message(4, 14), Readiness.READY),
        (message(5, 99), Readiness.READY),  # the other one has stopped
        (message(4, 14, 99), Readiness.READY),
        (message(4, 99), Readiness.LAGS),  # it computes something else
        (message(2), Readiness.NOT_YET),
        (message(2, error="full", retryable=True), Readiness.FAILED),
        (message(2, 12, finish=FinishReason.STOP), Readiness.FAILED),
    ],
)
def test_it_is_ready_when_it_lags_little_and_says_the_same(
    said: SessionTokens, judged: Readiness
) -> None:
    assert NextAttempt(member=B, attempt=Attempt(1)).judge(said, EMITTED) is judged


def test_it_is_not_submitted_anew_for_ever() -> None:
    following = NextAttempt(member=B, attempt=Attempt(1), num_renewals=RENEWALS_MAX)
    assert following.judge(message(0, 10), EMITTED) is Readiness.READY
    assert following.judge(message(0, 99), EMITTED) is Readiness.FAILED


class Lockstep:
    """Ranks that step together, as one map's do. A rank computes `chunk` tokens of a prompt in one
    step, and finds in its cache what it has computed before."""

    def __init__(self, chunk: int = 4, num_sessions: int = 1, members: tuple[Member, ...] = (A, B)):
        self.table = SessionTable(rank_chooser=RankChooser(), policy=SessionPolicy())
        self.table.on_map(members, 0.0)
        for each in members:
            self.table.on_link_opened(each, 16, 0.0)
        self.chunk = chunk
        self.now = 0.0
        self.running: dict[tuple[Member, SessionId], tuple[Submit, int]] = {}  # tokens known there
        self.cached: dict[tuple[Member, SessionId], int] = {}
        self.to_ranks: deque[Action] = deque()
        self.sessions: list[StreamSession] = []
        self.refusing: set[Member] = set()
        for number in range(num_sessions):
            sampling = SamplingParams(max_tokens=60)
            prompt = tuple(range(20))
            session, actions = self.table.open(SessionId(f"{number}"), prompt, sampling, 0.0)
            self.sessions.append(session)
            self.to_ranks += actions

    def step(self) -> None:
        """What was sent in the last step arrives; the tokens of this one reach the gateway."""
        self.now += 1.0
        frames: dict[Member, list[SessionTokens]] = {}
        while self.to_ranks:
            if isinstance(action := self.to_ranks.popleft(), SendToRank):
                frames.setdefault(action.member, []).extend(self._take(action))
        for place, (submit, num_known) in list(self.running.items()):
            num_computed = self.cached.get(place, 0)
            self.cached[place] = num_computed = min(num_computed + self.chunk, num_known)
            if num_computed == num_known:
                index = num_known - (len(submit.tokens) - submit.num_emitted)
                said = SessionTokens(
                    session=submit.session,
                    attempt=submit.attempt,
                    index=index,
                    ids=(100 + index,),
                    finish=FinishReason.LENGTH if index == 59 else None,
                )
                frames.setdefault(place[0], []).append(said)
                self.running[place] = (submit, num_known + 1)
                if said.finish:
                    del self.running[place]
        for rank, said_there in frames.items():
            self.to_ranks += self.table.on_tokens(rank, said_there, LOAD, self.now)

    def _take(self, action: SendToRank) -> list[SessionTokens]:
        sent = action.message
        place = (action.member, sent.session)
        if isinstance(sent, Cancel):
            if place in self.running and self.running[place][0].attempt <= sent.attempt:
                del self.running[place]
        elif action.member in self.refusing:
            refusal = SessionTokens(
                session=sent.session,
                attempt=sent.attempt,
                index=sent.num_emitted,
                ids=(),
                error="full",
                retryable=True,
            )
            return [refusal]
        else:
            self.running[place] = (sent, len(sent.tokens))
        return []

    def drain(self, *members: Member) -> None:
        self.table.on_drains(frozenset(members))
        self.to_ranks += self.table.vacate(members, self.now)

    def finish(self) -> None:
        for _ in range(400):
            if all(session.ended for session in self.sessions):
                return
            self.step()
        raise AssertionError("a session never ended")


def until_tokens(cluster: Lockstep, count: int) -> None:
    while min(len(session.emitted) for session in cluster.sessions) < count:
        cluster.step()


def test_a_session_moves_while_it_goes_on_and_waits_two_steps_at_most() -> None:
    """Its prompt takes many steps on the other rank; its client notices nothing of them."""
    cluster = Lockstep()
    (session,) = cluster.sessions
    until_tokens(cluster, 5)
    session.longest_gap_s = 0.0
    assert session.member == A
    cluster.drain(A)
    cluster.finish()
    assert (session.member, session.moves) == (B, 1)
    assert session.emitted == [100 + index for index in range(60)]
    assert session.longest_gap_s <= 3.0
    assert not cluster.running


def test_a_few_move_at_a_time_and_in_the_end_all_have() -> None:
    cluster = Lockstep(num_sessions=10)
    until_tokens(cluster, 3)
    cluster.drain(A)
    there = [session for session in cluster.sessions if session.member == A]
    assert sum(session.next is not None for session in there) == MOVES_AT_ONCE
    cluster.finish()
    assert {session.member for session in cluster.sessions} == {B}
    for session in cluster.sessions:
        assert session.emitted == [100 + index for index in range(60)]


def test_with_no_rank_to_go_to_a_session_stays() -> None:
    cluster = Lockstep()
    until_tokens(cluster, 3)
    cluster.drain(A, B)
    cluster.finish()
    assert cluster.sessions[0].moves == 0


def test_a_refusal_changes_nothing_and_the_move_is_tried_again() -> None:
    cluster = Lockstep()
    (session,) = cluster.sessions
    until_tokens(cluster, 3)
    cluster.refusing = {B}
    cluster.drain(A)
    cluster.step()
    assert (session.member, session.next) == (A, None)
    assert session.ready_at == cluster.now + RETRY_S
    cluster.refusing = set()
    cluster.finish()
    assert (session.member, session.moves) == (B, 1)
    assert session.emitted == [100 + index for index in range(60)]


@pytest.mark.parametrize("lost", [A, B])
def test_either_rank_may_die_in_the_middle(lost: Member) -> None:
    cluster = Lockstep(members=(A, B, C))
    (session,) = cluster.sessions
    until_tokens(cluster, 3)
    cluster.drain(A)
    cluster.step()
    assert session.next is not None
    other = session.next.member
    dead = A if lost == A else other
    for place in [place for place in cluster.running if place[0] == dead]:
        del cluster.running[place]
    cluster.to_ranks += cluster.table.on_link_broken(dead, cluster.now)
    assert session.state is SessionState.RUNNING
    cluster.finish()
    assert session.emitted == [100 + index for index in range(60)]
    assert session.member not in (A, dead)
    assert not cluster.running


@pytest.mark.parametrize("how", ["cancel", "stop"])
def test_a_session_that_ends_meanwhile_leaves_neither_rank_with_work(how: str) -> None:
    cluster = Lockstep()
    (session,) = cluster.sessions
    until_tokens(cluster, 3)
    cluster.drain(A)
    cluster.step()
    cluster.to_ranks += getattr(cluster.table, how)(session)
    cluster.step()
    assert not cluster.running


def test_tokens_that_differ_are_computed_anew_after_the_clients() -> None:
    """Where arithmetic depends on the batch, two ranks may draw different tokens."""
    cluster = Lockstep()
    (session,) = cluster.sessions
    until_tokens(cluster, 5)
    cluster.drain(A)
    cluster.step()
    assert session.next is not None
    attempt, index = session.next.attempt, len(session.emitted) - 1
    differs = SessionTokens(session=session.id, attempt=attempt, index=index, ids=(7,))
    cluster.to_ranks += cluster.table.on_tokens(B, [differs], LOAD, cluster.now)
    assert session.next.attempt == attempt + 1
    cluster.finish()
    assert session.emitted == [100 + index for index in range(60)]
