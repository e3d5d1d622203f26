"""Keeps a channel open to every peer: the proof that it lives, the request for room, first contact
over the data network, and all that again after a failure. What is sent is not decided here."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from gpu_worker.kv_replication.block_form import BlockForm
from gpu_worker.kv_replication.channel import Channel
from gpu_worker.kv_replication.link import ReplicaLink
from shared.errors import WireError
from shared.handshake import ANSWER_TIMEOUT_S, expect, handshake
from shared.records import RankRecord
from shared.types import Member, RankId
from shared.wire import KvReplicaRegionOpened, OpenKvReplicaRegion, encode

log = structlog.get_logger()

REGISTRATION_TIMEOUT_S = 10.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 10.0
"""Each attempt takes a region of the peer that stays in quarantine for minutes."""
STABLE_AFTER_S = 10.0
"""A link that stood for so long is opened anew without hesitation."""
REFUSED_RETRY_S = 60.0
NOTIFY_INTERVAL_S = 0.15
"""All links together tell no more often than that, but where many news wait. So what a rank spends
on it does not grow with the number of ranks, and what each survivor has to compute again after a
death does not either."""


class DataTransport(Protocol):
    """What moves the bytes. See `mooncake_replicator.MooncakeReplicator`."""

    async def contact(self, opened: KvReplicaRegionOpened) -> None:
        """First contact. Raises ConnectionError, TimeoutError."""
        ...

    def channel(
        self, peer: RankRecord, opened: KvReplicaRegionOpened, ring: Callable[[], None]
    ) -> Channel:
        """`ring`, from any thread, when it has news for its link."""
        ...


class Refused(Exception):
    """The peer keeps no copies for this rank."""


class ReplicaLinks:
    """One task per peer, from its record's appearance until `close`."""

    def __init__(
        self, *, member: Member, form: BlockForm, data: DataTransport, tasks: asyncio.TaskGroup
    ) -> None:
        self._member = member
        self._form = form
        self._data = data
        self._tasks = tasks
        self._generations = itertools.count(1)
        self._running: dict[Member, asyncio.Task[None]] = {}
        self._open: Mapping[RankId, Channel] = {}

    @property
    def channels(self) -> Mapping[RankId, Channel]:
        """Never changed, but replaced. Any thread."""
        return self._open

    def keep(self, peer: RankRecord) -> None:
        if peer.member != self._member and peer.member not in self._running:
            self._running[peer.member] = self._tasks.create_task(self._keep(peer))

    def close(self, peer: Member) -> None:
        task = self._running.pop(peer, None)
        if task is not None:
            task.cancel()

    async def _keep(self, peer: RankRecord) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = BACKOFF_MIN_S
        is_first = True
        while True:
            began = loop.time()
            pause_s = backoff_s
            try:
                detail = await self._run_link(peer)
                if loop.time() - began >= STABLE_AFTER_S:
                    pause_s = backoff_s = BACKOFF_MIN_S
                    is_first = True
            except Refused as refusal:
                detail, pause_s = str(refusal), REFUSED_RETRY_S
            except (OSError, WireError) as error:
                detail = str(error) or type(error).__name__
            say = log.info if is_first else log.debug
            say("kv_replica_link_broken", peer=str(peer.member), detail=detail)
            is_first = False
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)

    async def _run_link(self, peer: RankRecord) -> str:
        """One connection, from its beginning to its end; says why it ended."""
        async with self._connect(peer) as (reader, writer):
            await handshake(peer, self._member, reader, writer)
            opened = await self._request_region(peer, reader, writer)
            await self._data.contact(opened)
            link = ReplicaLink(
                self._member, writer, pace_s=lambda: NOTIFY_INTERVAL_S * len(self._open)
            )
            channel = self._data.channel(peer, opened, link.notify)
            self._open = {**self._open, peer.rank: channel}
            log.info("kv_replica_link_open", peer=str(peer.member), slots=opened.num_slots)
            try:
                return await link.hold(channel, reader)
            finally:
                self._open = {r: c for r, c in self._open.items() if c is not channel}

    @asynccontextmanager
    async def _connect(
        self, peer: RankRecord
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(peer.control_host, peer.control_port)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def _request_region(
        self, peer: RankRecord, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> KvReplicaRegionOpened:
        """Raises Refused."""
        request = OpenKvReplicaRegion(
            source=self._member,
            generation=next(self._generations),
            layout=self._form.layout,
            block_bytes=self._form.block_bytes,
        )
        writer.write(encode(request))
        opened = await expect(reader, KvReplicaRegionOpened, REGISTRATION_TIMEOUT_S)
        asked = (peer.member, self._member, request.generation)
        if (opened.target, opened.source, opened.generation) != asked:
            raise WireError(f"rank {opened.target} has opened what was not asked for")
        if opened.num_slots == 0:
            raise Refused(opened.refusal)
        return opened
