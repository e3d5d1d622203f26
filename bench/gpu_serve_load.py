"""A steady load on a gateway, and what its streams have seen at any moment. Greedy prompts repeat,
so that every token can be compared with an undisturbed answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from cli.bench.stream_client import StreamClient, StreamRecord
from shared.clock import Clock

_RETRY_S = 0.5  # after an error: a load that is refused shall not become a storm


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One stream. `prompt` numbers what it asked."""

    prompt: int
    wanted_tokens: int
    record: StreamRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    at: float
    num_tokens: int


class SteadyLoad:
    """As many streams at once as there are prompts; each begins anew when it ends. `turns` and
    `arrivals` grow while it runs."""

    def __init__(
        self,
        client: StreamClient,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        clock: Clock,
    ) -> None:
        self._client, self._prompts, self._clock = client, prompts, clock
        self._new_tokens = new_tokens
        self.turns: list[Turn] = []
        self.arrivals: list[Arrival] = []

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for prompt in range(len(self._prompts)):
                tasks.create_task(self._keep(prompt))

    async def _keep(self, prompt: int) -> None:
        """The first streams end one after the other: later ones then do not begin all at once."""
        wanted = max(1, self._new_tokens * (prompt + 1) // len(self._prompts))
        while True:
            record = await self._turn(prompt, wanted)
            wanted = self._new_tokens
            if record.error is not None:
                await asyncio.sleep(_RETRY_S)

    async def _turn(self, prompt: int, wanted: int) -> StreamRecord:
        def on_start(record: StreamRecord) -> None:
            self.turns.append(Turn(prompt=prompt, wanted_tokens=wanted, record=record))

        return await self._client.run(self._prompts[prompt], wanted, self._note, on_start)

    def _note(self, num_tokens: int) -> None:
        self.arrivals.append(Arrival(at=self._clock.now(), num_tokens=num_tokens))
