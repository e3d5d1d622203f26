"""A steady load on a gateway, with the arrivals of all its streams. Each prompt is sent once,
because a second one would be found in a prefix cache. Part of `benchmarks.gpu_serve`."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

from cli.bench.stream_client import StreamClient, StreamRecord, random_prompts
from shared.clock import Clock

_RETRY_S = 0.5  # after an error: a load that is refused shall not become a storm


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    prompt: tuple[int, ...]
    wanted_tokens: int
    record: StreamRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    at: float
    num_tokens: int


class SteadyLoad:
    """A fixed number of streams; each starts a new turn when one ends. `turns` and `arrivals` grow
    while it runs."""

    def __init__(
        self,
        client: StreamClient,
        clock: Clock,
        *,
        streams: int,
        prompt_tokens: int,
        new_tokens: int,
        seed: int,
    ) -> None:
        self._client, self._clock = client, clock
        self._streams = streams
        self._prompt_tokens = prompt_tokens
        self._new_tokens = new_tokens
        self._seeds = itertools.count(seed)
        self.turns: list[Turn] = []
        self.arrivals: list[Arrival] = []

    async def run(self) -> None:
        """Runs until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for stream in range(self._streams):
                tasks.create_task(self._keep(stream))

    async def _keep(self, stream: int) -> None:
        """The first turns have different lengths, so that later ones do not begin all at once."""
        wanted = max(1, self._new_tokens * (stream + 1) // self._streams)
        while True:
            record = await self._turn(wanted)
            wanted = self._new_tokens
            if record.error is not None:
                await asyncio.sleep(_RETRY_S)

    async def _turn(self, wanted: int) -> StreamRecord:
        (prompt,) = random_prompts(next(self._seeds), 1, self._prompt_tokens)

        def on_start(record: StreamRecord) -> None:
            self.turns.append(Turn(prompt=tuple(prompt), wanted_tokens=wanted, record=record))

        return await self._client.run(prompt, wanted, self._note, on_start)

    def _note(self, num_tokens: int) -> None:
        self.arrivals.append(Arrival(at=self._clock.now(), num_tokens=num_tokens))
