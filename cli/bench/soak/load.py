"""The load of a soak: a fixed number of clients, each with requests of one kind, whose undisturbed
answers are known."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cli.bench.chaos.statistics import Damage, damage_of
from cli.bench.soak.requests import RequestKind, SoakRequest
from cli.bench.stream_client import StreamClient, StreamRecord
from shared.errors import Unavailable

_PAUSE_AFTER_ERROR_S = 0.1
_LAST_STREAMS_S = 60.0
_ERRORS_MAX = 20


@dataclass(slots=True, kw_only=True)
class LoadCount:
    """What became of the requests of one kind. `lost` broke off after they had been accepted,
    `refused` were not accepted; `damage` is of all, also of those."""

    sent: int = 0
    left: int = 0
    lost: int = 0
    refused: int = 0
    resumed: int = 0
    tokens: int = 0
    longest_gap_ms: float = 0.0
    damage: Damage = Damage()
    errors: set[str] = field(default_factory=set)

    @property
    def wrong(self) -> int:
        return self.damage.lost + self.damage.doubled + self.damage.changed

    def add(self, record: StreamRecord, expected: Sequence[int], *, has_left: bool) -> None:
        self.sent += 1
        self.tokens += len(record.ids)
        self.resumed += record.resumed
        self.longest_gap_ms = max(self.longest_gap_ms, *record.gaps_ms(), 0.0)
        is_whole = record.error is None and record.finish is not None
        self.damage += damage_of(record.ids, expected, is_whole=is_whole)
        self.left += has_left
        if record.error is not None and not has_left:
            self.lost += record.accepted
            self.refused += not record.accepted
            if len(self.errors) < _ERRORS_MAX:
                self.errors.add(record.error)


class SoakLoad:
    """Clients take the gateways, and the requests of their kind, in turn. Every second sending of a
    request finds no cached blocks."""

    def __init__(
        self,
        gateways: Sequence[StreamClient],
        requests: Sequence[SoakRequest],
        *,
        clients: int,
        seed: int,
        leave_within_s: tuple[float, float] = (0.01, 1.5),
    ) -> None:
        """`leave_within_s`: from when until when a client leaves that does not wait for the end."""
        self._gateways, self._requests, self._num_clients = gateways, requests, clients
        self._rng = random.Random(seed)
        self._leave_within_s = leave_within_s
        self._sent = 0
        self._stop = asyncio.Event()
        self._expected: dict[int, list[int]] = {}
        self.counts = {kind: LoadCount() for kind in RequestKind}

    async def learn(self) -> None:
        """Has every request answered once while nothing disturbs. Raises Unavailable."""
        for number, request in enumerate(self._requests):
            record = await self._gateways[0].post(request.path, request.fields)
            if record.error is not None:
                raise Unavailable(f"an undisturbed {request.kind.value} failed: {record.error}")
            self._expected[number] = record.ids

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Puts the load on while the body runs. At its end streams may end, too."""
        kinds = list(RequestKind)
        async with asyncio.TaskGroup() as tasks:
            workers = [
                tasks.create_task(self._work(kinds[number % len(kinds)]))
                for number in range(self._num_clients)
            ]
            yield
            self._stop.set()
            await asyncio.wait(workers, timeout=_LAST_STREAMS_S)
            for worker in workers:
                worker.cancel()

    async def _work(self, kind: RequestKind) -> None:
        mine = [number for number, each in enumerate(self._requests) if each.kind is kind]
        while not self._stop.is_set():
            self._sent += 1
            number = mine[self._rng.randrange(len(mine))]
            record, has_left = await self._send(number)
            self.counts[kind].add(record, self._expected[number], has_left=has_left)
            if record.error is not None and not has_left:
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    async def _send(self, number: int) -> tuple[StreamRecord, bool]:
        """The record, and whether the client went away before the end."""
        request = self._requests[number]
        fields = dict(request.fields)
        if self._sent % 2:
            fields["cache_salt"] = uuid.uuid4().hex
        gateway = self._gateways[self._sent % len(self._gateways)]
        if request.kind is not RequestKind.LEFT:
            return await gateway.post(request.path, fields, resumes=True), False
        records: list[StreamRecord] = []
        sending = gateway.post(request.path, fields, on_start=records.append, resumes=True)
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(sending)
            await asyncio.wait({asked}, timeout=self._rng.uniform(*self._leave_within_s))
            has_left = not asked.done()
            asked.cancel()
        return records[0], has_left
