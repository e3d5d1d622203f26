"""What becomes of a request's sessions, as events of its span: where they were placed, when their
ranks were lost and when they went on. Told when it happens or when a session has ended, never at a
token."""

from __future__ import annotations

from gateway.stream_session import StreamSession
from shared.tracing import TraceSpan
from shared.wire import Submit


def trace_placement(span: TraceSpan, rank: int, submit: Submit) -> None:
    span.event(
        "session.placed",
        {
            "starfish.session": submit.session,
            "starfish.attempt": submit.attempt,
            "starfish.rank": rank,
            "starfish.emitted_tokens": submit.num_emitted,
        },
    )


def trace_end(span: TraceSpan, session: StreamSession) -> None:
    """The events of a session that has ended, at the times when they happened."""
    name = {"starfish.session": session.id}
    if session.first_token_at is not None:
        queued = {"starfish.queue_s": session.queue_s, "starfish.cached": session.cached_tokens}
        span.event("session.first_token", {**name, **queued}, at=session.first_token_at)
    for resumption in session.resumptions:
        lost_at = resumption.at - resumption.gap_s
        span.event("session.rank_lost", name, at=lost_at)
        told = {"starfish.gap_s": resumption.gap_s, "starfish.on_copy": resumption.on_copy}
        span.event("session.resumed", {**name, **told}, at=resumption.at)
    outcome = session.state.value if session.failure is None else session.failure.kind.value
    span.event(
        "session.ended",
        {
            **name,
            "starfish.outcome": outcome,
            "starfish.emitted_tokens": len(session.emitted),
            "starfish.moves": session.moves,
        },
    )
