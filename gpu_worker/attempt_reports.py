"""Says of each attempt on this rank when it begins and how it ends: in the log at the level debug,
and as a span of its request's trace. Every line has the client's request id. It decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from gpu_worker.engine.sequence import Origin
from shared.tracing import Tracer, TraceSpan
from shared.types import Attempt, Epoch, Member, SessionId
from shared.wire import Cancel, SessionTokens, Submit

log = structlog.get_logger()


@dataclass(slots=True)
class _Open:
    origin: Origin
    attempt: Attempt
    request_id: str
    span: TraceSpan | None
    num_tokens: int = 0


class AttemptReports:
    """For ranks that trace or log so much; others have none. All methods run on the event loop."""

    def __init__(self, member: Member, tracer: Tracer | None) -> None:
        self._member = member
        self._tracer = tracer
        self._open: dict[SessionId, _Open] = {}

    def on_submit(self, origin: Origin, submit: Submit) -> None:
        """It was taken into the engine's inbox."""
        if (before := self._open.pop(submit.session, None)) is not None:
            self._close(submit.session, before, "replaced")
        self._open[submit.session] = _Open(
            origin, submit.attempt, submit.request_id, self._span_of(submit)
        )
        log.debug(
            "attempt_submitted",
            request_id=submit.request_id,
            session=submit.session,
            attempt=submit.attempt,
            tokens=len(submit.tokens),
            emitted=submit.num_emitted,
        )

    def on_tokens(self, sessions: Iterable[SessionTokens]) -> None:
        """What a step gave, before it is sent."""
        for tokens in sessions:
            found = self._open.get(tokens.session)
            if found is None or found.attempt != tokens.attempt:
                continue
            if found.span is not None and tokens.ids and not found.num_tokens:
                found.span.event(
                    "first_token",
                    {
                        "starfish.cached_tokens": tokens.cached_tokens,
                        "starfish.queued_ms": tokens.queued_ms,
                    },
                )
            found.num_tokens += len(tokens.ids)
            if tokens.error is not None or tokens.finish is not None:
                del self._open[tokens.session]
                outcome = tokens.finish.value if tokens.finish is not None else "failed"
                self._close(tokens.session, found, outcome, tokens.error)

    def on_cancel(self, cancel: Cancel) -> None:
        found = self._open.get(cancel.session)
        if found is not None and found.attempt <= cancel.attempt:
            del self._open[cancel.session]
            self._close(cancel.session, found, "cancelled")

    def on_origin_gone(self, origin: Origin) -> None:
        """The connection of a gateway has ended, and its attempts with it."""
        for session in [s for s, each in self._open.items() if each.origin == origin]:
            self._close(session, self._open.pop(session), "gateway_gone")

    def on_adopted(self, epoch: Epoch, *, abandoned: bool) -> None:
        """The rank runs under the map of this epoch. `abandoned`: a step was thrown away, and is
        run again."""
        attributes = {"starfish.epoch": epoch, "starfish.step_abandoned": abandoned}
        for each in self._open.values():
            if each.span is not None:
                each.span.event("map_adopted", attributes)

    def close(self) -> None:
        """The incarnation has ended."""
        for session, each in self._open.items():
            self._close(session, each, "rank_ended")
        self._open.clear()

    def _span_of(self, submit: Submit) -> TraceSpan | None:
        """Without a parent the gateway does not trace, and the rank does not either."""
        if self._tracer is None or not submit.traceparent:
            return None
        return self._tracer.start(
            "attempt",
            {
                "starfish.rank": self._member.rank,
                "starfish.incarnation": self._member.incarnation,
                "starfish.request_id": submit.request_id,
                "starfish.session": submit.session,
                "starfish.attempt": submit.attempt,
                "starfish.submitted_tokens": len(submit.tokens),
                "starfish.emitted_tokens": submit.num_emitted,
            },
            parent=submit.traceparent,
        )

    def _close(
        self, session: SessionId, found: _Open, outcome: str, error: str | None = None
    ) -> None:
        log.debug(
            "attempt_ended",
            request_id=found.request_id,
            session=session,
            attempt=found.attempt,
            outcome=outcome,
            tokens=found.num_tokens,
            error=error,
        )
        if found.span is not None:
            found.span.describe(
                {"starfish.outcome": outcome, "starfish.generated_tokens": found.num_tokens}
            )
            found.span.end(error=error)
