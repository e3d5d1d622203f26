"""Answers a job from its generation: as one body, or as a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import structlog
from aiohttp import web

from gateway.api.errors import http_error
from gateway.api.job import Job
from gateway.api.request_context import require_context
from gateway.api.responses import DONE, ChunkWriter, Usage, error_event, response_body
from gateway.generation import Delta, Generation
from gateway.stream_session import SessionFailed

log = structlog.get_logger()

WRITE_TIMEOUT_S = 60.0
"""A client that reads nothing for this long counts as gone."""

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
    writer = _ChunkEvents(job, generation, require_context(request).id)
    return await stream_events(request, generation, job, writer)


class EventWriter(Protocol):
    """How the events of one stream are spelt."""

    async def events(self, deltas: Sequence[Delta]) -> bytes:
        """For a batch of tokens; the first time with what a stream begins with."""
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
    response = web.StreamResponse(headers={**_EVENT_STREAM_HEADERS, RANK_HEADER: ranks})
    try:
        await response.prepare(request)
        while True:
            data = await writer.events(deltas)
            if generation.done:
                await _write(request, response, data + writer.end(), last=True)
                break
            if data:
                await _write(request, response, data)
            deltas = await generation.next_deltas()
    except SessionFailed as error:
        await response.write(writer.failed(error))
    except (ConnectionError, TimeoutError):
        log.info("client_gone", request=job.header.id)
        if request.transport is not None:
            request.transport.abort()
    return response


def failure_event(error: SessionFailed, request_id: str) -> bytes:
    """The end of a stream that has failed, in OpenAI's shape."""
    return error_event(http_error(error).of_request(request_id).body) + DONE


class _ChunkEvents:
    """OpenAI's chunks. Implements `EventWriter`."""

    def __init__(self, job: Job, generation: Generation, request_id: str) -> None:
        self._job = job
        self._generation = generation
        self._request_id = request_id
        self._writers = job.choice_writers()
        self._is_first = True
        self._chunks = ChunkWriter(
            job.header,
            with_token_ids=job.options.return_token_ids,
            include_usage=job.options.include_usage,
        )

    async def events(self, deltas: Sequence[Delta]) -> bytes:
        data = b""
        if self._job.options.continuous_usage:
            self._chunks.set_usage(self._usage())
        if self._is_first:
            data = _role_chunks(self._job, self._chunks)
            self._is_first = False
        for delta in deltas:
            data += await self._writers[delta.choice].chunk(delta, self._chunks)
        return data

    def end(self) -> bytes:
        if not self._job.options.include_usage:
            return DONE
        return self._chunks.usage_chunk(self._usage()) + DONE

    def failed(self, error: SessionFailed) -> bytes:
        return failure_event(error, self._request_id)

    def _usage(self) -> Usage:
        return self._job.usage(self._generation, self._writers)


def _role_chunks(job: Job, chunks: ChunkWriter) -> bytes:
    content = not (job.plan is not None and job.plan.must_call)
    return b"".join(chunks.role_chunk(index, content=content) for index in range(len(job.tasks)))


async def _write(
    request: web.Request, response: web.StreamResponse, data: bytes, *, last: bool = False
) -> None:
    """With the `last` ones the body ends, in the same write. Raises TimeoutError if the client
    reads nothing for WRITE_TIMEOUT_S."""
    write = response.write_eof if last else response.write
    transport = request.transport
    if transport is not None and transport.get_write_buffer_size() == 0:
        await write(data)  # cannot wait long, and a timeout costs more than the write
        return
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await write(data)
