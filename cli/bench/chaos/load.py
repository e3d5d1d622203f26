"""The load during faults: a fixed number of streams that begin anew as soon as they end, over a
fixed set of prompts whose undisturbed answers are known."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from cli.bench.chaos.statistics import Stream
from cli.bench.stream_client import StreamClient, StreamRecord, random_prompts
from shared.clock import Clock
from shared.errors import Unavailable

_PAUSE_AFTER_ERROR_S = 0.1
_LAST_STREAMS_S = 60.0
_TEMPERATURE = 0.8


class ChaosLoad:
    """Streams take the clients in turn. Half of the prompts are answered greedily, half with a
    seed. No request finds the cached blocks of another: each has a cache salt of its own."""

    def __init__(
        self,
        clients: Sequence[StreamClient],
        clock: Clock,
        *,
        streams: int,
        num_prompts: int,
        prompt_tokens: int,
        new_tokens: int,
        seed: int,
    ) -> None:
        self._clients, self._clock = clients, clock
        self._num_streams, self._new_tokens = streams, new_tokens
        self._prompts = random_prompts(seed, num_prompts, prompt_tokens)
        self._sent = 0
        self._stop = asyncio.Event()
        self.expected: list[list[int]] = []
        self.streams: list[Stream] = []
        self.ticks: list[tuple[float, int]] = []

    async def learn(self) -> None:
        """Has every prompt answered once while nothing disturbs. Raises Unavailable."""
        free = asyncio.Semaphore(self._num_streams)

        async def one(prompt: int) -> StreamRecord:
            async with free:
                return await self._run(prompt, prompt)

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(one(prompt)) for prompt in range(len(self._prompts))]
        records = [task.result() for task in asked]
        errors = [record.error for record in records if record.error is not None]
        if errors:
            raise Unavailable(f"an undisturbed stream failed: {errors[0]}")
        self.expected = [record.ids for record in records]
        self.ticks.clear()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Puts the load on while the body runs. At its end streams may end, too."""
        self.streams.clear()
        self.ticks.clear()
        self._stop.clear()
        async with asyncio.TaskGroup() as tasks:
            workers = [tasks.create_task(self._work()) for _ in range(self._num_streams)]
            try:
                yield
            finally:
                self._stop.set()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait(workers, timeout=_LAST_STREAMS_S)
                for worker in workers:
                    worker.cancel()

    async def _work(self) -> None:
        while not self._stop.is_set():
            number = self._sent
            self._sent += 1
            prompt = number % len(self._prompts)
            record = await self._run(prompt, number)
            if record.error is not None:
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    async def _run(self, prompt: int, number: int) -> StreamRecord:
        fields: dict[str, Any] = {"cache_salt": uuid.uuid4().hex}
        if prompt % 2:
            fields |= {"temperature": _TEMPERATURE, "seed": prompt}
        client = self._clients[number % len(self._clients)]
        started: list[Stream] = []

        def on_start(record: StreamRecord) -> None:
            started.append(Stream(prompt=prompt, record=record))
            self.streams.append(started[0])

        record = await client.run(
            self._prompts[prompt],
            self._new_tokens,
            self._on_tokens,
            on_start,
            fields=fields,
            resumes=True,
        )
        started[0].ended_at = self._clock.now()
        return record

    def _on_tokens(self, num_tokens: int) -> None:
        self.ticks.append((self._clock.now(), num_tokens))
