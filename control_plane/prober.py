"""Keeps a connection to every rank's control port and pings it: at a long interval normally, at a
short one while any member is suspected. Now and then it asks what the rank has counted of its
experts. It reports what it sees and judges nothing. While etcd cannot be written, the leader hands
maps to the ranks on these connections."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator

from control_plane.probe_events import (
    ProbeBroken,
    ProbeConnected,
    ProbeCounts,
    ProbeEvent,
    ProbePong,
    ProbeRefused,
)
from shared.errors import AddressReused, WireError
from shared.expert_map import ExpertMap
from shared.handshake import Access, Caller, introduce
from shared.records import RankRecord, pack_map
from shared.types import Member, Role
from shared.wire import (
    ExpertCounts,
    ExpertCountsQuery,
    OfferMap,
    Ping,
    Pong,
    encode,
    read_message,
)

_CONNECT_TIMEOUT_S = 1.0
_WELCOME_TIMEOUT_S = 2.0
_RECONNECT_S = (0.05, 0.15)
_QUICK_RETRIES_S = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016)
_UNSENT_BYTES_MAX = 64 << 10
_COUNTS_INTERVAL_OF_RANK_S = 0.01
"""With many ranks each is asked less often, so that the answers remain a few MB a second."""

Report = Callable[[ProbeEvent], Awaitable[None]]


class Prober:
    """`watch` sets the ranks to probe, `set_urgent` the interval. Call `run` once."""

    def __init__(
        self,
        *,
        name: str,
        access: Access,
        report: Report,
        interval_s: float,
        urgent_interval_s: float,
        counts_interval_s: float = 0.0,
    ) -> None:
        """`counts_interval_s` is the least time between two questions for counts of experts; 0: it
        asks none."""
        self._caller = Caller(role=Role.CONTROL_PLANE, name=name)
        self._access = access
        self._report = report
        self._intervals_s = (interval_s, urgent_interval_s)
        self._counts_interval_s = counts_interval_s
        self._urgent = False
        self._urgent_event = asyncio.Event()
        self._wanted: dict[Member, RankRecord] = {}
        self._writers: dict[Member, asyncio.StreamWriter] = {}  # of those that have let us in
        self._changed = asyncio.Event()

    def watch(self, records: Iterable[RankRecord]) -> None:
        wanted = {record.member: record for record in records}
        if wanted.keys() != self._wanted.keys():
            self._changed.set()
        self._wanted = wanted

    def set_urgent(self, urgent: bool) -> None:
        if urgent == self._urgent:
            return
        self._urgent = urgent
        if urgent:
            self._urgent_event.set()
        else:
            self._urgent_event.clear()

    def offer_map(self, expert_map: ExpertMap) -> None:
        """Hands the map to those of its members that are connected."""
        offer = encode(OfferMap(expert_map=pack_map(expert_map)))
        for member in expert_map.members:
            if (writer := self._writers.get(member)) is not None:
                writer.write(offer)

    async def run(self) -> None:
        tasks: dict[Member, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                for member in [m for m in tasks if m not in self._wanted]:
                    tasks.pop(member).cancel()
                for member, record in self._wanted.items():
                    if member not in tasks:
                        tasks[member] = group.create_task(self._probe(record))
                self._changed.clear()
                await self._changed.wait()

    async def _probe(self, record: RankRecord) -> None:
        """After a connection that worked has ended, connects again at once, because a refusal would
        prove the death. A dying process may close its listener last, so a few quick attempts
        follow."""
        quick_retries: Iterator[float] = iter(())
        while True:
            worked = False
            try:
                worked = await self._run_connection(record)
                await self._report(ProbeBroken(member=record.member))
            except (ConnectionRefusedError, AddressReused):  # either way it listens no more
                await self._report(ProbeRefused(member=record.member))
            except (ConnectionError, WireError):
                await self._report(ProbeBroken(member=record.member))
            except (OSError, TimeoutError):
                pass  # unreachable: the detector counts this as silence
            if worked:
                quick_retries = iter(_QUICK_RETRIES_S)
            await asyncio.sleep(next(quick_retries, random.uniform(*_RECONNECT_S)))

    async def _run_connection(self, record: RankRecord) -> bool:
        """Returns, when the connection ends, whether it ever answered a Ping. Raises OSError,
        TimeoutError, WireError."""
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(record.control_host, record.control_port)
        try:
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                await introduce(self._caller, record, self._access, reader, writer)
            self._writers[record.member] = writer
            await self._report(ProbeConnected(member=record.member))
            async with asyncio.TaskGroup() as group:
                pings = group.create_task(self._ping(writer))
                answered = await self._listen(reader, record.member)
                pings.cancel()
            return answered
        finally:
            if self._writers.get(record.member) is writer:
                del self._writers[record.member]
            writer.close()

    async def _listen(self, reader: asyncio.StreamReader, member: Member) -> bool:
        answered = False
        try:
            while (message := await read_message(reader)) is not None:
                if isinstance(message, Pong):
                    answered = True
                    await self._report(ProbePong(member=member, pong=message))
                elif isinstance(message, ExpertCounts):
                    await self._report(ProbeCounts(member=member, counts=message))
        except (ConnectionError, WireError):
            return answered
        return answered

    async def _ping(self, writer: asyncio.StreamWriter) -> None:
        nonce, loop = 0, asyncio.get_running_loop()
        counts_at = loop.time()
        while True:
            if writer.transport.get_write_buffer_size() < _UNSENT_BYTES_MAX:
                nonce += 1
                writer.write(encode(Ping(nonce=nonce)))
                if self._counts_interval_s and not self._urgent and loop.time() >= counts_at:
                    writer.write(encode(ExpertCountsQuery(nonce=nonce)))
                    least_s = _COUNTS_INTERVAL_OF_RANK_S * len(self._wanted)
                    counts_at = loop.time() + max(self._counts_interval_s, least_s)
            await self._wait_for_next_ping()

    async def _wait_for_next_ping(self) -> None:
        """Waits for the present interval. If probing becomes urgent, a long wait ends at once."""
        normal_s, urgent_s = self._intervals_s
        if self._urgent:
            await asyncio.sleep(urgent_s)
            return
        try:
            async with asyncio.timeout(normal_s):
                await self._urgent_event.wait()
        except TimeoutError:
            return
