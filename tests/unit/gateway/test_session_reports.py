"""What a gateway and a rank log about a session names the client's request."""

from __future__ import annotations

import structlog

from gateway.request_tag import RequestTag
from gateway.session_driver import LOGGED_MOVES_MAX, log_moves
from gateway.stream_session import SendToRank
from gpu_worker.attempt_reports import AttemptReports
from gpu_worker.engine.sequence import Origin
from shared.types import (
    Attempt,
    FinishReason,
    Incarnation,
    Member,
    RankId,
    SamplingParams,
    SessionId,
)
from shared.wire import SessionTokens, Submit

MEMBER = Member(rank=RankId(3), incarnation=Incarnation(7))


def submit(number: int) -> Submit:
    return Submit(
        session=SessionId(f"g/{number}"),
        attempt=Attempt(1),
        tokens=(5, 6),
        num_emitted=1,
        sampling=SamplingParams(),
        request_id=f"req-{number:03}",
    )


def test_sessions_that_move_are_one_line_that_names_some_of_their_requests() -> None:
    moved = [SendToRank(member=MEMBER, message=submit(n)) for n in range(LOGGED_MOVES_MAX + 10)]
    with structlog.testing.capture_logs() as lines:
        log_moves(moved)
    (line,) = lines
    assert line["number"] == LOGGED_MOVES_MAX + 10
    assert line["ranks"] == [3]
    assert line["request_ids"] == [f"req-{n:03}" for n in range(LOGGED_MOVES_MAX)]


def test_a_rank_says_when_an_attempt_begins_and_how_it_ends() -> None:
    reports = AttemptReports(MEMBER, None)
    with structlog.testing.capture_logs() as lines:
        reports.on_submit(Origin(1), submit(4))
        ended = SessionTokens(
            session=SessionId("g/4"),
            attempt=Attempt(1),
            index=1,
            ids=(9,),
            finish=FinishReason.STOP,
        )
        reports.on_tokens([ended])
        reports.on_tokens([ended])
    assert [(line["event"], line["request_id"]) for line in lines] == [
        ("attempt_submitted", "req-004"),
        ("attempt_ended", "req-004"),
    ]
    assert (lines[1]["outcome"], lines[1]["tokens"]) == ("stop", 1)


def test_a_tag_without_a_span_is_no_part_of_a_trace() -> None:
    assert RequestTag(request_id="r").traceparent == ""
