"""The events of a stream in OpenAI's shape: chunks, each with an id by which the stream can be
resumed after it. What the client of a resumed stream has had is made again and left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from gateway.api.errors import http_error
from gateway.api.job import Job
from gateway.api.responses import DONE, ChunkWriter, Usage, error_event
from gateway.choice_reader import Delta
from gateway.generation import Generation
from gateway.session_state import SessionFailed
from gateway.stream_position import PartlyRead, PositionWriter


def failure_event(error: SessionFailed, request_id: str) -> bytes:
    """The end of a stream that has failed."""
    return error_event(http_error(error).of_request(request_id).body) + DONE


class ChunkEvents:
    """Implements `answer.EventWriter`."""

    def __init__(self, job: Job, generation: Generation, request_id: str) -> None:
        self._job = job
        self._generation = generation
        self._request_id = request_id
        self._writers = job.choice_writers()
        self._ids = None if job.stream is None else job.stream.position_writer()
        self._is_first = True
        self._tells_usage = job.options.continuous_usage
        self._chunks = ChunkWriter(
            job.header,
            with_token_ids=job.options.return_token_ids,
            include_usage=job.options.include_usage,
            seed=job.named_seed,
        )

    @property
    def is_quick(self) -> bool:
        return not any(writer.has_logprobs for writer in self._writers)

    async def events(self, deltas: Sequence[Delta]) -> bytes:
        data = b""
        if self._tells_usage:
            self._chunks.set_usage(self._usage())
        if self._is_first:
            data = b"".join(self._opening())
            self._is_first = False
        for delta in deltas:
            data += self._spelt(delta, await self._writers[delta.choice].logprobs(delta))
        return data

    def quick_events(self, delta: Delta) -> bytes:
        if self._tells_usage:
            self._chunks.set_usage(self._usage())
        return self._spelt(delta, None)

    def end(self) -> bytes:
        if not self._job.options.include_usage:
            return DONE
        line = b"" if self._ids is None else self._ids.everything()
        return line + self._chunks.usage_chunk(self._usage()) + DONE

    def failed(self, error: SessionFailed) -> bytes:
        return failure_event(error, self._request_id)

    def _spelt(self, delta: Delta, logprobs: msgspec.Raw | None) -> bytes:
        events = self._writers[delta.choice].chunks(delta, self._chunks, logprobs)
        if self._ids is None:
            return b"".join(events)
        return with_ids(self._ids, delta, events)

    def _usage(self) -> Usage:
        return self._job.usage(self._generation, self._writers)

    def _opening(self) -> Iterator[bytes]:
        """Of a chat: an event for each choice."""
        job, stream = self._job, self._job.stream
        content = not (job.plan is not None and job.plan.must_call)
        num_read = 0 if stream is None or stream.read is None else stream.read.num_opened
        for number in range(len(job.tasks)):
            event = self._chunks.role_chunk(number, content=content)
            if event and number >= num_read:
                yield event if self._ids is None else self._ids.opening(number + 1) + event


def with_ids(ids: PositionWriter, delta: Delta, events: Sequence[bytes]) -> bytes:
    """The `events` that tell of `delta`, without those that the client has had."""
    data = b""
    if len(events) > 1:
        for number, event in enumerate(events[:-1], start=1):
            if number > delta.num_events_read:
                part = PartlyRead(
                    num_tokens=len(delta.token_ids), num_events=number, is_last=delta.is_last
                )
                data += ids.part_line(delta.choice, part) + event
    ids.advance(delta.choice, delta.end, ended=delta.finish is not None, rank=delta.rank)
    if len(events) > delta.num_events_read:
        data += ids.line() + events[-1]
    return data
