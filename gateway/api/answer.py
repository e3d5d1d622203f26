"""Answers a job from its generation: as one body, or as a stream of events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import structlog
from aiohttp import web

from gateway.api.chunk_events import ChunkEvents
from gateway.api.job import Job
from gateway.api.request_context import require_context
from gateway.api.responses import response_body
from gateway.api.stream_body import StreamBody, StreamResponse
from gateway.choice_reader import Delta
from gateway.generation import Generation
from gateway.session_state import SessionFailed

log = structlog.get_logger()

RANK_HEADER = "x-starfish-rank"
"""Header of a stream: the ranks on which its choices began, so that a client can tell which streams
a death affects."""

_EVENT_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


AnswerJob = Callable[[web.Request, Generation, Job], Awaitable[web.StreamResponse]]
"""Raises SessionFailed for a failure before anything is sent."""


async def answer_job(request: web.Request, generation: Generation, job: Job) -> web.StreamResponse:
    """Raises SessionFailed."""
    if job.options.stream:
        return await answer_stream(request, generation, job)
    return await answer_whole(generation, job)


async def answer_whole(generation: Generation, job: Job) -> web.Response:
    """Raises SessionFailed."""
    writers = job.choice_writers()
    while not generation.done:
        for delta in await generation.next_deltas():
            writers[delta.choice].take(delta)
    body = response_body(
        job.header,
        [await writer.choice() for writer in writers],
        job.usage(generation, writers),
        with_token_ids=job.options.return_token_ids,
    )
    return web.Response(body=body, content_type="application/json")


async def answer_stream(
    request: web.Request, generation: Generation, job: Job
) -> web.StreamResponse:
    """Raises SessionFailed for a failure before the first batch of tokens."""
    writer = ChunkEvents(job, generation, require_context(request).id)
    return await stream_events(request, generation, job, writer)


async def answer_read(request: web.Request, end: bytes) -> web.StreamResponse:
    """The `end` of a stream of which the client has everything else."""
    response = StreamResponse(headers=_EVENT_STREAM_HEADERS)
    body = StreamBody(request, response)
    await response.prepare(request)
    await body.write(end, last=True)
    return response


class EventWriter(Protocol):
    """How the events of one stream are spelt."""

    @property
    def is_quick(self) -> bool:
        """Whether `quick_events` serves the stream; if not, its events take so long to make that
        others are served in between."""
        ...

    async def events(self, deltas: Sequence[Delta]) -> bytes:
        """For a batch of tokens; the first time with what a stream begins with."""
        ...

    def quick_events(self, delta: Delta) -> bytes:
        """The same as `events` after the first time."""
        ...

    def end(self) -> bytes: ...

    def failed(self, error: SessionFailed) -> bytes:
        """The last events of a stream that fails after it has begun."""
        ...


async def stream_events(
    request: web.Request, generation: Generation, job: Job, writer: EventWriter
) -> web.StreamResponse:
    """One write per batch of tokens. Raises SessionFailed for a failure before the first batch; a
    later one is the stream's last event."""
    deltas = await generation.next_deltas()
    ranks = ",".join(str(rank) for rank in generation.ranks)
    response = StreamResponse(headers={**_EVENT_STREAM_HEADERS, RANK_HEADER: ranks})
    body = StreamBody(request, response)

    def pass_on(delta: Delta) -> bool:
        if not body.takes_more:
            return False
        body.write_now(writer.quick_events(delta))
        return True

    try:
        await response.prepare(request)
        try:
            while True:
                data = await writer.events(deltas)
                if generation.done:
                    await body.write(data + writer.end(), last=True)
                    break
                if data:
                    await body.write(data)
                deltas = await generation.next_deltas(pass_on if writer.is_quick else None)
        except SessionFailed as error:
            await body.write(writer.failed(error), last=True)
    except (ConnectionError, TimeoutError):
        log.info("client_gone", request=job.header.id)
        if request.transport is not None:
            request.transport.abort()
    return response
