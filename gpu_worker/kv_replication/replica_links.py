"""Keeps a channel open to every peer: connects to it, requests a region, makes first contact over
the data network, and repeats all of that after a failure. What is sent is not decided here."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

import structlog

from gpu_worker.kv_replication.block_form import BlockForm
from gpu_worker.kv_replication.channel import Channel, RemoteSlots
from gpu_worker.kv_replication.data_transport import DataTransport
from gpu_worker.kv_replication.link import ReplicaLink
from gpu_worker.kv_replication.sender import Sender
from gpu_worker.kv_replication.staging_buffer import StagingBuffers
from shared.errors import WireError
from shared.handshake import ANSWER_TIMEOUT_S, Access, expect, open_link
from shared.records import RankRecord
from shared.types import Member, NodeId, RankId
from shared.wire import KvReplicaRegionOpened, OpenKvReplicaRegion, encode

log = structlog.get_logger()

REGISTRATION_TIMEOUT_S = 10.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 10.0
"""The backoff grows, because each attempt uses a region of the peer that then stays in quarantine
for minutes."""
STABLE_AFTER_S = 10.0
"""A link that was open for this long is opened again after the shortest backoff."""
REFUSED_RETRY_S = 60.0
NOTIFY_INTERVAL_S = 0.15
"""All links together send notifications no more often than this, unless many are pending. So
neither what a rank spends on notifications nor what a survivor has to compute again after a death
grows with the number of ranks."""


class Refused(Exception):
    """The peer stores no replicas for this rank."""


class ReplicaLinks:
    """One task for each peer, from the appearance of its record until `close`."""

    def __init__(
        self,
        *,
        member: Member,
        access: Access,
        node: NodeId,
        form: BlockForm,
        transport: DataTransport,
        sender: Sender,
        staging_buffers: StagingBuffers,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._member = member
        self._access = access
        self._node = node
        self._form = form
        self._transport = transport
        self._sender = sender
        self._staging_buffers = staging_buffers
        self._tasks = tasks
        self._generations = itertools.count(1)
        self._running: dict[Member, asyncio.Task[None]] = {}
        self._contacted: dict[Member, Callable[[], None]] = {}  # closes what was opened
        self._open: Mapping[RankId, Channel] = {}

    @property
    def channels(self) -> Mapping[RankId, Channel]:
        """By the rank of their target. The mapping is replaced, never changed. Any thread."""
        return self._open

    def keep(self, peer: RankRecord) -> None:
        if peer.member != self._member and peer.member not in self._running:
            self._running[peer.member] = self._tasks.create_task(self._keep(peer))

    def close(self, peer: Member) -> None:
        task = self._running.pop(peer, None)
        if task is not None:
            task.cancel()
        if (close_after_exit := self._contacted.pop(peer, None)) is not None:
            close_after_exit()

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
        """One connection, from its beginning to its end. Returns why it ended."""
        async with self._connect(peer) as (reader, writer):
            await open_link(peer, self._member, self._access, reader, writer)
            opened = await self._request_region(peer, reader, writer)
            after_last_slot = opened.address + opened.num_slots * self._form.block_bytes
            self._contacted[peer.member] = partial(
                self._transport.close_after_exit,
                opened.transfer_name,
                after_last_slot,
                (peer.control_host, peer.control_port),
            )
            await self._transport.contact(opened.target, opened.transfer_name, after_last_slot)
            link = ReplicaLink(
                self._member, writer, pace_s=lambda: NOTIFY_INTERVAL_S * len(self._open)
            )
            channel = self._make_channel(peer, opened, link)
            self._open = {**self._open, peer.rank: channel}
            log.info("kv_replica_link_open", peer=str(peer.member), slots=opened.num_slots)
            try:
                return await link.hold(channel, reader)
            finally:
                self._open = {r: c for r, c in self._open.items() if c is not channel}

    def _make_channel(
        self, peer: RankRecord, opened: KvReplicaRegionOpened, link: ReplicaLink
    ) -> Channel:
        remote = RemoteSlots(
            target=peer.member,
            is_on_other_node=peer.node != self._node,
            generation=opened.generation,
            transfer_name=opened.transfer_name,
            address=opened.address,
            num_slots=opened.num_slots,
            block_bytes=self._form.block_bytes,
        )
        return Channel(
            remote,
            self._staging_buffers,
            notify_sender=self._sender.notify,
            notify_link=link.notify,
        )

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
        """Raises Refused, WireError, TimeoutError."""
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
            raise WireError(f"rank {opened.target} has opened what was not requested")
        if opened.num_slots == 0:
            raise Refused(opened.refusal)
        return opened
