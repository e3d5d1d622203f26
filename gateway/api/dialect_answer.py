"""Answers a chat in a dialect that is not OpenAI's chat completions: as one body, or as a stream of
events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aiohttp import web

from gateway.api.answer import stream_events
from gateway.api.answer_reader import AnswerReader
from gateway.api.dialect import Dialect, Ending
from gateway.api.errors import http_error
from gateway.api.job import Job
from gateway.api.responses import Usage
from gateway.choice_reader import Delta
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
            reason=self.reader.finish_reason(self._finish),
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
        return await stream_events(request, generation, job, _DialectEvents(dialect, choice))
    while not generation.done:
        for delta in await generation.next_deltas():
            choice.take(delta)
    body = dialect.whole(choice.reader.message(), choice.ending())
    return web.Response(body=body, content_type="application/json")


class _DialectEvents:
    """Implements `answer.EventWriter`."""

    is_quick = True

    def __init__(self, dialect: Dialect, choice: _OneChoice) -> None:
        self._dialect = dialect
        self._choice = choice
        self._is_first = True

    async def events(self, deltas: Sequence[Delta]) -> bytes:
        data = b""
        if self._is_first:
            data = self._dialect.begin(self._choice.usage())
            self._is_first = False
        return data + b"".join(map(self.quick_events, deltas))

    def quick_events(self, delta: Delta) -> bytes:
        return self._dialect.deltas(self._choice.take(delta))

    def end(self) -> bytes:
        return self._dialect.end(self._choice.ending())

    def failed(self, error: SessionFailed) -> bytes:
        return self._dialect.failed(http_error(error))
