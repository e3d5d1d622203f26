"""Answers a chat in a dialect that is not OpenAI's chat completions: as one body, or as a stream of
events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aiohttp import web

from gateway.api.answer import stream_events
from gateway.api.answer_reader import AnswerReader
from gateway.api.chunk_events import with_ids
from gateway.api.dialect import Dialect, Ending
from gateway.api.errors import http_error
from gateway.api.job import Job
from gateway.api.responses import Usage
from gateway.api.resumption import Stream
from gateway.choice_reader import ALL_READ, Delta
from gateway.generation import Generation
from gateway.session_state import SessionFailed
from shared.types import FinishReason


class _OneChoice:
    """The only choice of a chat: what it says, and how it ended."""

    def __init__(self, job: Job, generation: Generation) -> None:
        self._job = job
        self._generation = generation
        self._finish = FinishReason.LENGTH
        self._stop: str | int | None = None
        self.reader: AnswerReader = job.chat_reader()

    def take(self, delta: Delta) -> list[dict[str, object]]:
        self._finish = delta.finish or self._finish
        self._stop = delta.stop
        return self.reader.feed(delta.text, delta.token_ids, delta.finish)

    def usage(self) -> Usage:
        counted = self._job.usage(self._generation)
        return replace(counted, reasoning_tokens=self.reader.num_reasoning_tokens)

    def ending(self) -> Ending:
        return Ending(
            reason=self.reader.finish_reason(self._finish, self._stop),
            stop_string=self._stop if isinstance(self._stop, str) else None,
            usage=self.usage(),
        )


async def answer_job_in(
    dialect: Dialect, request: web.Request, generation: Generation, job: Job
) -> web.StreamResponse:
    """Raises SessionFailed for a failure before the first tokens of a stream, or of a whole
    answer."""
    choice = _OneChoice(job, generation)
    if job.options.stream:
        writer = _DialectEvents(dialect, choice, job.stream)
        return await stream_events(request, generation, job, writer)
    while not generation.done:
        for delta in await generation.next_deltas():
            choice.take(delta)
    body = dialect.whole(choice.reader.whole(), choice.ending())
    return web.Response(body=body, content_type="application/json")


class _DialectEvents:
    """Implements `answer.EventWriter`. The last events belong to the last tokens: `end` has no
    more."""

    is_quick = True

    def __init__(self, dialect: Dialect, choice: _OneChoice, stream: Stream | None) -> None:
        """`stream`: the events have ids, and those that its client has had are left out."""
        self._dialect = dialect
        self._choice = choice
        self._stream = stream
        self._ids = None if stream is None else stream.position_writer(counts_events=True)
        self._is_first = True
        self._is_behind = stream is not None and stream.read is not None

    async def events(self, deltas: Sequence[Delta]) -> bytes:
        data = b""
        if self._is_first:
            data = self._opening()
            self._is_first = False
        return data + b"".join(map(self.quick_events, deltas))

    def quick_events(self, delta: Delta) -> bytes:
        if self._is_behind and delta.num_events_read != ALL_READ:
            self._catch_up(delta.num_events_read)
        events = self._dialect.deltas(self._choice.take(delta))
        if delta.finish is not None:
            events += self._dialect.end(self._choice.ending())
        return b"".join(events) if self._ids is None else with_ids(self._ids, delta, events)

    def end(self) -> bytes:
        return b""

    def _catch_up(self, num_events_read: int) -> None:
        """What the client has had may have been cut into other events: their number goes on. Of the
        next ones it has had the first `num_events_read`."""
        self._is_behind = False
        read = None if self._stream is None else self._stream.read
        if read is not None and read.choices:
            self._dialect.number_from(max(0, read.num_events - num_events_read))

    def _opening(self) -> bytes:
        events = self._dialect.begin(self._choice.usage())
        if self._stream is None or self._ids is None:
            return b"".join(events)
        read = self._stream.read
        num_read = 0 if read is None else len(events) if read.choices else read.num_opened
        numbered = list(enumerate(events, start=1))[num_read:]
        return b"".join(self._ids.opening(number) + event for number, event in numbered)

    def failed(self, error: SessionFailed) -> bytes:
        if self._is_behind:
            self._catch_up(0)
        return self._dialect.failed(http_error(error))
