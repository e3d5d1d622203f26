"""Answers a job from its generation: as one body, or as a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from gateway.api.errors import http_error
from gateway.api.job import Job
from gateway.api.request_context import require_context
from gateway.api.responses import DONE, ChunkWriter, error_event, response_body
from gateway.generation import Generation
from gateway.stream_session import SessionFailed

log = structlog.get_logger()

WRITE_TIMEOUT_S = 60.0
"""A client that reads nothing for this long counts as gone."""

RANK_HEADER = "x-starfish-rank"
"""Header of a stream: the ranks on which its choices began, so that a client can tell which streams
a death affects."""

EVENT_STREAM_HEADERS = {
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
    """One write per batch of tokens. Raises SessionFailed for a failure before the first batch; a
    later one becomes the stream's last event."""
    deltas = await generation.next_deltas()
    ranks = ",".join(str(rank) for rank in generation.ranks)
    response = web.StreamResponse(headers={**EVENT_STREAM_HEADERS, RANK_HEADER: ranks})
    chunks = ChunkWriter(
        job.header,
        with_token_ids=job.options.return_token_ids,
        include_usage=job.options.include_usage,
    )
    writers = job.choice_writers()
    is_first = True
    try:
        await response.prepare(request)
        data = b""
        while True:
            if job.options.continuous_usage:
                chunks.set_usage(job.usage(generation, writers))
            if is_first:
                data = _role_chunks(job, chunks)
                is_first = False
            for delta in deltas:
                data += await writers[delta.choice].chunk(delta, chunks)
            if generation.done:
                if job.options.include_usage:
                    data += chunks.usage_chunk(job.usage(generation, writers))
                data += DONE
            if generation.done:
                await write_events(request, response, data, last=True)
                break
            if data:
                await write_events(request, response, data)
            data = b""
            deltas = await generation.next_deltas()
    except SessionFailed as error:
        problem = http_error(error).of_request(require_context(request).id)
        await response.write(error_event(problem.body) + DONE)
    except (ConnectionError, TimeoutError):
        give_up_on_client(request, job)
    return response


def _role_chunks(job: Job, chunks: ChunkWriter) -> bytes:
    content = not (job.plan is not None and job.plan.must_call)
    return b"".join(chunks.role_chunk(index, content=content) for index in range(len(job.tasks)))


async def write_events(
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


def give_up_on_client(request: web.Request, job: Job) -> None:
    """It reads nothing, or has closed the connection."""
    log.info("client_gone", request=job.header.id)
    if request.transport is not None:
        request.transport.abort()
