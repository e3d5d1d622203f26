"""A session: every event in every state, and exactly-once delivery for any order of messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from gateway.api.errors import http_error
from gateway.session_state import (
    TRANSITIONS,
    FailureKind,
    SessionEvent,
    SessionFailed,
    SessionPolicy,
    SessionState,
)
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
from shared.wire import Cancel, SessionTokens, Submit, TokenLogprob

A = Member(rank=RankId(0), incarnation=Incarnation(1))
B = Member(rank=RankId(1), incarnation=Incarnation(1))
POLICY = SessionPolicy(no_rank_timeout_s=10, refusals_max=3, losses_max=2)


def new_session(max_tokens: int = 8, grammar: str = "") -> StreamSession:
    return StreamSession(
        session=SessionId("g/1"),
        prompt=(7, 8, 9),
        sampling=SamplingParams(max_tokens=max_tokens, seed=3, grammar=grammar),
        policy=POLICY,
        now=0.0,
    )


def tokens(
    index: int,
    *ids: int,
    attempt: int = 0,
    finish: FinishReason | None = None,
    error: str | None = None,
    retryable: bool = False,
    cached_tokens: int = 0,
) -> SessionTokens:
    return SessionTokens(
        session=SessionId("g/1"),
        attempt=Attempt(attempt),
        index=index,
        ids=ids,
        finish=finish,
        error=error,
        retryable=retryable,
        cached_tokens=cached_tokens,
    )


def in_state(state: SessionState) -> StreamSession:
    session = new_session()
    if state is SessionState.WAITING:
        return session
    session.place(A, 0.0)
    session.on_tokens(A, tokens(0, 1), 1.0)
    match state:
        case SessionState.FINISHED:
            session.on_tokens(A, tokens(1, 2, finish=FinishReason.STOP), 1.0)
        case SessionState.FAILED:
            session.shut_down()
        case SessionState.CANCELLED:
            session.cancel()
    assert session.state is state
    return session


@dataclass(frozen=True, slots=True)
class Case:
    event: SessionEvent
    fire: Callable[[StreamSession], list[SendToRank]]


def reason(error: str, *, retryable: bool) -> SessionTokens:
    return tokens(1, error=error, retryable=retryable)


def move(session: StreamSession) -> list[SendToRank]:
    session.prepare_move(B)
    return session.on_tokens(B, tokens(1, 2, attempt=1), 2.0)


CASES = [
    Case(SessionEvent.PLACED, lambda s: s.place(B, 0.0)),
    Case(SessionEvent.TOKENS, lambda s: s.on_tokens(A, tokens(1, 2), 2.0)),
    Case(SessionEvent.ENDED, lambda s: s.on_tokens(A, tokens(1, 2, finish=FinishReason.STOP), 2.0)),
    Case(SessionEvent.REFUSED, lambda s: s.on_tokens(A, reason("full", retryable=True), 2.0)),
    Case(SessionEvent.RANK_LOST, lambda s: s.on_rank_lost(A, 2.0)),
    Case(SessionEvent.MOVED, move),
    Case(SessionEvent.REJECTED, lambda s: s.on_tokens(A, reason("bad", retryable=False), 2.0)),
    Case(SessionEvent.GIVEN_UP, lambda s: s.shut_down()),
    Case(SessionEvent.STOPPED, lambda s: s.stop()),
    Case(SessionEvent.CLIENT_GONE, lambda s: s.cancel()),
]


@pytest.mark.parametrize("state", SessionState)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.event.value)
def test_every_event_in_every_state_goes_where_the_table_says(
    state: SessionState, case: Case
) -> None:
    session = in_state(state)
    before = (list(session.emitted), session.finish, session.failure)
    sent = case.fire(session)
    target = TRANSITIONS.get((state, case.event))
    assert session.state is (target or state)
    if target is None:
        assert sent == []
        assert (session.emitted, session.finish, session.failure) == before


def test_every_event_is_in_the_cases() -> None:
    assert {case.event for case in CASES} == set(SessionEvent)


def test_the_first_submit_carries_the_prompt_and_the_next_all_tokens_so_far() -> None:
    session = new_session()
    (first,) = session.place(A, 0.0)
    assert first == SendToRank(
        member=A,
        message=Submit(
            session=SessionId("g/1"),
            attempt=Attempt(0),
            tokens=(7, 8, 9),
            num_emitted=0,
            sampling=session.sampling,
        ),
    )
    session.on_tokens(A, tokens(0, 1, 2), 1.0)
    session.on_rank_lost(A, 1.0)
    (second,) = session.place(B, 0.0)
    assert isinstance(second.message, Submit)
    assert (second.message.tokens, second.message.num_emitted) == ((7, 8, 9, 1, 2), 2)
    assert (second.message.attempt, session.moves) == (1, 1)


def test_late_repeated_and_foreign_messages_change_nothing() -> None:
    session = new_session()
    session.place(A, 0.0)
    session.on_tokens(A, tokens(0, 1, 2), 1.0)
    session.on_tokens(A, tokens(0, 1, 2), 1.0)
    session.on_tokens(A, tokens(1, 2), 1.0)
    session.on_tokens(B, tokens(2, 99), 1.0)
    session.on_rank_lost(A, 1.0)
    session.on_tokens(A, tokens(2, 3), 1.0)
    session.place(B, 0.0)
    session.on_tokens(B, tokens(2, 99, attempt=0), 1.0)
    session.on_tokens(A, tokens(2, 99, attempt=1), 1.0)
    assert session.emitted == [1, 2]


def test_of_an_overlapping_message_only_the_new_part_counts() -> None:
    session = new_session()
    session.place(A, 0.0)
    session.on_tokens(A, tokens(0, 1, 2), 1.0)
    session.on_tokens(A, tokens(1, 2, 3, 4), 1.0)
    assert session.emitted == [1, 2, 3, 4]


def test_a_gap_moves_the_session_and_cancels_the_attempt() -> None:
    session = new_session()
    session.place(A, 0.0)
    sent = session.on_tokens(A, tokens(1, 5), 1.0)
    assert session.state is SessionState.WAITING
    assert sent == [
        SendToRank(member=A, message=Cancel(session=SessionId("g/1"), attempt=Attempt(0)))
    ]


def test_it_takes_no_more_than_max_tokens_and_then_ends() -> None:
    session = new_session(max_tokens=3)
    session.place(A, 0.0)
    sent = session.on_tokens(A, tokens(0, 1, 2, 3, 4), 1.0)
    assert (session.emitted, session.finish) == ([1, 2, 3], FinishReason.LENGTH)
    assert session.state is SessionState.FINISHED
    assert [type(s.message) for s in sent] == [Cancel]


def test_a_rank_that_cancels_by_itself_is_left_but_its_tokens_stay() -> None:
    session = new_session()
    session.place(A, 0.0)
    session.on_tokens(A, tokens(0, 1, finish=FinishReason.CANCELLED), 1.0)
    assert (session.state, session.emitted) == (SessionState.WAITING, [1])


def test_refusals_back_off_and_end_after_their_limit() -> None:
    session = new_session()
    waits = []
    for attempt in range(POLICY.refusals_max):
        session.place(A, 0.0)
        session.on_tokens(A, tokens(0, error="full", retryable=True, attempt=attempt), 1.0)
        assert session.state is SessionState.WAITING
        waits.append(session.ready_at - 1.0)
    assert all(0 < wait <= POLICY.backoff_max_s * 1.5 for wait in waits)
    assert waits[2] > waits[0]
    session.place(A, 0.0)
    session.on_tokens(A, tokens(0, error="full", retryable=True, attempt=3), 1.0)
    assert session.failure is not None
    assert session.failure.kind is FailureKind.OVERLOADED
    assert "full" in session.failure.message
    answer = http_error(SessionFailed(session.failure))
    assert (answer.status, answer.headers) == (429, {"Retry-After": "1"})


def test_a_session_that_loses_rank_after_rank_without_a_token_fails() -> None:
    session = new_session()
    for _ in range(POLICY.losses_max):
        session.place(A, 0.0)
        session.on_rank_lost(A, 1.0)
        assert session.state is SessionState.WAITING
    session.place(A, 0.0)
    session.on_rank_lost(A, 1.0)
    assert session.failure is not None
    assert session.failure.kind is FailureKind.RANKS_LOST


def test_a_guided_session_may_lose_one_rank_without_a_token_and_no_second() -> None:
    session = new_session(grammar="start: A")
    session.place(A, 0.0)
    session.on_rank_lost(A, 1.0)
    assert session.state is SessionState.WAITING
    session.place(B, 0.0)
    session.on_rank_lost(B, 2.0)
    assert session.state is SessionState.FAILED
    assert session.failure is not None
    assert session.failure.kind is FailureKind.RANKS_LOST


def test_a_grammar_that_a_rank_cannot_follow_ends_its_session_there() -> None:
    session = new_session(grammar="start: A")
    session.place(A, 0.0)
    said = replace(tokens(0, error="too long"), invalid=True)
    session.on_tokens(A, said, 1.0)
    assert session.state is SessionState.FAILED
    assert session.failure is not None
    assert session.failure.kind is FailureKind.INVALID
    assert session.attempt == 0
    assert http_error(SessionFailed(session.failure)).status == 400


def test_a_token_between_losses_starts_the_count_anew() -> None:
    session = new_session()
    for attempt in range(6):
        session.place(A, 0.0)
        session.on_tokens(A, tokens(attempt, 5, attempt=attempt), 1.0)
        session.on_rank_lost(A, 1.0)
    assert session.state is SessionState.WAITING


def test_it_gives_up_at_its_deadline_and_not_before() -> None:
    session = new_session()
    session.on_time(9.9)
    assert session.state is SessionState.WAITING
    session.on_time(10.0)
    assert session.failure is not None
    assert session.failure.kind is FailureKind.NO_RANK


def test_a_timeout_that_is_over_before_it_begins_says_no_negative_time() -> None:
    session = StreamSession(
        session=SessionId("g/1"),
        prompt=(7,),
        sampling=SamplingParams(max_tokens=8),
        policy=POLICY,
        now=5.0,
        expires_at=4.0,
    )
    session.on_time(5.0)
    assert session.failure is not None
    assert "0 s after it began" in session.failure.message


def test_the_deadline_counts_from_the_loss_of_a_rank_that_served() -> None:
    session = new_session()
    session.place(A, 0.0)
    session.on_rank_lost(A, 100.0)
    assert session.deadline_at == 110.0


def test_it_knows_its_first_token_and_its_longest_gap() -> None:
    session = new_session()
    session.place(A, 0.0)
    for index, at in enumerate([2.0, 2.5, 4.0, 4.1]):
        session.on_tokens(A, tokens(index, index), at)
    assert (session.first_token_at, session.longest_gap_s) == (2.0, 1.5)


# the frequent message


def running(*ids: int) -> StreamSession:
    session = new_session()
    session.place(A, 0.0)
    session.on_tokens(A, tokens(0, *ids), 1.0)
    return session


def facts(session: StreamSession) -> dict[str, object]:
    return {name: getattr(session, name) for name in StreamSession.__slots__ if name != "next"} | {
        "emitted": list(session.emitted)
    }


def test_tokens_that_are_only_the_next_ones_are_taken_at_once() -> None:
    quick, careful = running(1, 2), running(1, 2)
    for index, at in ((2, 1.5), (3, 4.0), (4, 4.5)):
        assert quick.extend(A, tokens(index, index), at)
        assert careful.on_tokens(A, tokens(index, index), at) == []
    assert quick.emitted == [1, 2, 2, 3, 4]
    assert facts(quick) == facts(careful)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (B, tokens(2, 5)),
        (A, tokens(2, 5, attempt=1)),
        (A, tokens(1, 2, 5)),  # one of them is known
        (A, tokens(3, 5)),  # one is missing
        (A, tokens(2)),
        (A, tokens(2, 3, 4, 5, 6, 7, 8)),  # up to max_tokens
        (A, tokens(2, 5, finish=FinishReason.STOP)),
        (A, tokens(2, error="full", retryable=True)),
        (A, replace(tokens(2, 5), backup_rank=1)),
        (A, replace(tokens(2, 5), taken_over=True)),
        (A, replace(tokens(2, 5), prompt_logprobs=(TokenLogprob(logprob=-1.0, rank=1),))),
    ],
)
def test_a_message_that_says_more_is_left_to_the_whole_of_the_rules(
    member: Member, message: SessionTokens
) -> None:
    session = running(1, 2)
    before = facts(session)
    assert not session.extend(member, message, 2.0)
    assert facts(session) == before


def test_so_are_a_first_token_and_what_comes_after_a_loss_or_an_end() -> None:
    begun = new_session()
    begun.place(A, 0.0)
    assert not begun.extend(A, tokens(0, 1), 1.0)
    moved = running(1)
    moved.on_rank_lost(A, 1.0)
    assert not moved.extend(A, tokens(1, 2), 1.5)
    moved.place(B, 2.0)
    assert not moved.extend(B, tokens(1, 2, attempt=1), 2.5)
    moved.on_tokens(B, tokens(1, 2, attempt=1), 2.5)
    assert moved.extend(B, tokens(2, 3, attempt=1), 2.6)
    moved.cancel()
    assert not moved.extend(B, tokens(3, 4, attempt=1), 2.7)
    scored = StreamSession(
        session=SessionId("g/1"),
        prompt=(7,),
        sampling=SamplingParams(max_tokens=8, logprobs=1),
        policy=POLICY,
        now=0.0,
    )
    scored.place(A, 0.0)
    first = replace(tokens(0, 1), logprobs=(TokenLogprob(logprob=-1.0, rank=1),))
    scored.on_tokens(A, first, 1.0)
    assert not scored.extend(A, tokens(1, 2), 2.0)


# log-probabilities


def logprob(value: float) -> TokenLogprob:
    return TokenLogprob(logprob=value, rank=1)


def asking(*, max_tokens: int = 4, **asked: int) -> StreamSession:
    opened = new_session(max_tokens=max_tokens)
    opened.sampling = replace(opened.sampling, **asked)  # type: ignore[arg-type]
    return opened


def scores(*values: float) -> tuple[TokenLogprob, ...]:
    return tuple(logprob(value) for value in values)


def test_log_probabilities_follow_the_tokens_that_are_taken() -> None:
    stream = asking(logprobs=0)
    stream.place(A, 0.0)
    stream.on_tokens(A, replace(tokens(0, 7, 8), logprobs=scores(-1, -2)), 0.0)
    stream.on_tokens(A, replace(tokens(1, 8, 9), logprobs=scores(-2, -3)), 0.0)
    assert stream.emitted == [7, 8, 9]
    assert stream.logprobs == list(scores(-1, -2, -3))


def test_tokens_without_the_log_probabilities_asked_for_are_not_taken() -> None:
    stream = asking(logprobs=0)
    stream.place(A, 0.0)
    stream.on_tokens(A, tokens(0, 7), 0.0)
    assert (stream.state, stream.emitted) == (SessionState.WAITING, [])


def test_a_prompt_cut_in_its_scoring_is_asked_again_and_each_score_taken_once() -> None:
    stream = asking(prompt_logprobs=0)
    stream.place(A, 0.0)
    stream.on_tokens(A, replace(tokens(0), prompt_logprobs=scores(-1), prompt_index=1), 0.0)
    stream.on_rank_lost(A, 0.0)
    (again,) = stream.place(B, 0.0)
    assert isinstance(again.message, Submit)
    assert again.message.sampling.prompt_logprobs == 0
    late = replace(tokens(0, attempt=1), prompt_logprobs=scores(-1, -2), prompt_index=1)
    stream.on_tokens(B, late, 0.0)
    assert stream.prompt_logprobs == list(scores(-1, -2))
    stream.on_rank_lost(B, 0.0)
    (last,) = stream.place(A, 0.0)
    assert isinstance(last.message, Submit)
    assert last.message.sampling.prompt_logprobs is None


def test_a_gap_in_a_prompts_scores_is_a_reason_to_move() -> None:
    stream = asking(prompt_logprobs=0)
    stream.place(A, 0.0)
    stream.on_tokens(A, replace(tokens(0), prompt_logprobs=scores(-1), prompt_index=2), 0.0)
    assert (stream.state, stream.prompt_logprobs) == (SessionState.WAITING, [])


def test_scoring_alone_ends_with_its_last_score_not_its_first() -> None:
    stream = asking(max_tokens=0, prompt_logprobs=0)
    stream.place(A, 0.0)
    stream.on_tokens(A, replace(tokens(0), prompt_logprobs=scores(-1), prompt_index=1), 0.0)
    assert stream.state is SessionState.RUNNING
    last = replace(tokens(0), prompt_logprobs=scores(-2), prompt_index=2)
    stream.on_tokens(A, replace(last, finish=FinishReason.LENGTH), 0.0)
    assert (stream.state, stream.finish) == (SessionState.FINISHED, FinishReason.LENGTH)


def test_cached_tokens_are_those_of_the_rank_that_gave_the_first_token() -> None:
    session = new_session()
    session.place(A, 0.0)
    session.on_tokens(A, tokens(0, 1, cached_tokens=2), 1.0)
    session.on_rank_lost(A, 2.0)
    session.place(B, 0.0)
    session.on_tokens(B, tokens(1, 2, attempt=1, cached_tokens=3), 3.0)
    assert session.cached_tokens == 2


def test_generated_tokens_in_the_cache_are_no_prompt_tokens() -> None:
    session = new_session()
    session.place(A, 0.0)
    session.on_tokens(A, tokens(0, 1, cached_tokens=16), 1.0)
    assert session.cached_tokens == len(session.prompt)
