"""Answers a job as SGLang's `/generate` does: each event of a stream has the whole text so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from gateway.api.answer import stream_events
from gateway.api.chunk_events import failure_event
from gateway.api.job import Job
from gateway.api.request_context import require_context
from gateway.api.responses import DONE
from gateway.choice_reader import Delta
from gateway.generation import Generation
from gateway.session_state import SessionFailed
from shared.types import FinishReason


class GeneratedText:
    """One choice so far."""

    def __init__(self, job: Job, index: int) -> None:
        choice = f"-{index}" if len(job.tasks) > 1 else ""
        self._id = job.header.id + choice
        self._num_prompt_tokens = len(job.tasks[index].prompt)
        self._text = ""
        self._token_ids: list[int] = []
        self._finish: dict[str, Any] | None = None

    def take(self, delta: Delta) -> None:
        self._text += delta.text
        self._token_ids += delta.token_ids
        if delta.finish is FinishReason.STOP:
            own_end = self._token_ids[-1] if self._token_ids else None
            matched = own_end if delta.stop is None else delta.stop
            self._finish = {"type": "stop", "matched": matched}
        elif delta.finish is not None:
            self._finish = {"type": delta.finish.value, "length": len(self._token_ids)}

    def plain(self, *, cached_tokens: int) -> dict[str, Any]:
        return {
            "text": self._text,
            "output_ids": self._token_ids,
            "meta_info": {
                "id": self._id,
                "finish_reason": self._finish,
                "prompt_tokens": self._num_prompt_tokens,
                "completion_tokens": len(self._token_ids),
                "cached_tokens": cached_tokens,
            },
        }


class GenerateAnswer:
    """`is_batch`: the answer is a list, and the events of a stream have an `index`."""

    def __init__(self, *, is_batch: bool) -> None:
        self._is_batch = is_batch

    async def __call__(
        self, request: web.Request, generation: Generation, job: Job
    ) -> web.StreamResponse:
        """Raises SessionFailed for a failure before the first tokens of a stream, or of a whole
        answer."""
        texts = [GeneratedText(job, index) for index in range(len(job.tasks))]
        if job.options.stream:
            events = _TextEvents(
                texts, generation, is_batch=self._is_batch, request_id=require_context(request).id
            )
            return await stream_events(request, generation, job, events)
        while not generation.done:
            for delta in await generation.next_deltas():
                texts[delta.choice].take(delta)
        plain = [
            text.plain(cached_tokens=generation.cached_tokens(index))
            for index, text in enumerate(texts)
        ]
        body = msgspec.json.encode(plain if self._is_batch else plain[0])
        return web.Response(body=body, content_type="application/json")


class _TextEvents:
    """Implements `answer.EventWriter`."""

    is_quick = True

    def __init__(
        self,
        texts: Sequence[GeneratedText],
        generation: Generation,
        *,
        is_batch: bool,
        request_id: str,
    ) -> None:
        self._texts = texts
        self._generation = generation
        self._is_batch = is_batch
        self._request_id = request_id

    async def events(self, deltas: Sequence[Delta]) -> bytes:
        return b"".join(map(self.quick_events, deltas))

    def quick_events(self, delta: Delta) -> bytes:
        text = self._texts[delta.choice]
        text.take(delta)
        plain = text.plain(cached_tokens=self._generation.cached_tokens(delta.choice))
        if self._is_batch:
            plain["index"] = delta.choice
        return b"data: %b\n\n" % msgspec.json.encode(plain)

    def end(self) -> bytes:
        return DONE

    def failed(self, error: SessionFailed) -> bytes:
        return failure_event(error, self._request_id)
