"""Answers a chat in a dialect that is not OpenAI's chat completions: as one body, or as a stream of
events."""

from __future__ import annotations

from dataclasses import replace

from aiohttp import web

from gateway.api.answer import EVENT_STREAM_HEADERS, RANK_HEADER, give_up_on_client, write_events
from gateway.api.answer_reader import AnswerReader
from gateway.api.dialect import Dialect, Ending
from gateway.api.errors import http_error
from gateway.api.job import Job
from gateway.api.responses import Usage
from gateway.generation import Delta, Generation
from gateway.stream_session import SessionFailed
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
    """Raises SessionFailed."""
    if job.options.stream:
        return await answer_stream_in(dialect, request, generation, job)
    return await answer_whole_in(dialect, generation, job)


async def answer_whole_in(dialect: Dialect, generation: Generation, job: Job) -> web.Response:
    """Raises SessionFailed."""
    choice = _OneChoice(job, generation)
    while not generation.done:
        for delta in await generation.next_deltas():
            choice.take(delta)
    body = dialect.whole(choice.reader.message(), choice.ending())
    return web.Response(body=body, content_type="application/json")


async def answer_stream_in(
    dialect: Dialect, request: web.Request, generation: Generation, job: Job
) -> web.StreamResponse:
    """Raises SessionFailed for a failure before the first tokens; a later one is the stream's last
    event."""
    choice = _OneChoice(job, generation)
    deltas = await generation.next_deltas()
    ranks = ",".join(str(rank) for rank in generation.ranks)
    response = web.StreamResponse(headers={**EVENT_STREAM_HEADERS, RANK_HEADER: ranks})
    try:
        await response.prepare(request)
        data = dialect.begin(choice.usage())
        while True:
            for delta in deltas:
                data += dialect.deltas(choice.take(delta))
            if generation.done:
                data += dialect.end(choice.ending())
            if data:
                await write_events(request, response, data)
            if generation.done:
                break
            data = b""
            deltas = await generation.next_deltas()
    except SessionFailed as error:
        await response.write(dialect.failed(http_error(error)))
    except (ConnectionError, TimeoutError):
        give_up_on_client(request, job)
    return response
