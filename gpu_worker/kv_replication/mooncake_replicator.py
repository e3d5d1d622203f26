"""This rank's end of KV replication over Mooncake: what it stores for its peers, and its channels
to them. Implements `engine.kv_replication.ReplicaEndpoint` and `control_server.KvReplicaHost`.
Which blocks are sent is decided elsewhere, by `writer.ReplicaWriter`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gpu_worker.engine.kv_replication import BlockCache
from gpu_worker.kv_replication.block_form import BlockForm
from gpu_worker.kv_replication.block_tags import BlockTags
from gpu_worker.kv_replication.channel import Channel
from gpu_worker.kv_replication.data_transport import DataTransport
from gpu_worker.kv_replication.replica_links import ReplicaLinks
from gpu_worker.kv_replication.sender import Sender
from gpu_worker.kv_replication.staging_buffer import StagingBuffers
from gpu_worker.kv_replication.store import StoredReplicas
from shared.errors import WireError
from shared.handshake import Access
from shared.records import RankRecord
from shared.types import Member, NodeId, RankId
from shared.wire import (
    DropKvReplicas,
    KvReplicaRegionOpened,
    KvReplicasDropped,
    KvReplicasStored,
    OpenKvReplicaRegion,
)

SWEEP_S = 5.0
READERS_POLL_S = 0.001
READERS_TIMEOUT_S = 2.0
"""The engine releases what it has found as soon as it has planned a step."""


class MooncakeReplicator:
    """Made once the model is loaded; `start` opens links to peers."""

    def __init__(
        self,
        *,
        member: Member,
        access: Access,
        node: NodeId,
        transport: DataTransport,
        cache: BlockCache,
        budget_bytes: int,
        num_ranks: int,
    ) -> None:
        """`budget_bytes` of host memory are for the replicas of all peers together. May block.
        Raises OSError if there is no memory for the staging buffers."""
        form = BlockForm(layout=cache.layout, block_bytes=cache.block_bytes)
        engine, clock = transport.engine, transport.clock
        tags = BlockTags(access)
        self.store = StoredReplicas(engine, form, tags, budget_bytes // max(1, num_ranks - 1))
        self._member = member
        self._access = access
        self._node = node
        self._transport = transport
        self._form = form
        self._clock = clock
        self._staging_buffers = StagingBuffers(cache.staging_buffer, engine)
        self._sender = Sender(engine, clock, tags)
        self._sender.start()
        self._links: ReplicaLinks | None = None

    def renew(self, member: Member) -> None:
        """The process goes on as `member`, and `start` follows. What peers have stored here is
        kept: it is found by its contents. On the event loop, after the tasks of `start` have
        ended."""
        self._member = member
        self._links = None
        self.store.on_all_gone(self._clock.now())

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """On the event loop. `tasks` owns all tasks from now on."""
        self._links = ReplicaLinks(
            member=self._member,
            access=self._access,
            node=self._node,
            form=self._form,
            transport=self._transport,
            sender=self._sender,
            staging_buffers=self._staging_buffers,
            tasks=tasks,
        )
        tasks.create_task(self._sweep())

    def channels(self) -> Mapping[RankId, Channel]:
        """The open channels, by the rank of their target. Any thread."""
        if self._links is None:
            return {}
        return {rank: c for rank, c in self._links.channels.items() if c.is_open}

    def keep(self, peer: RankRecord) -> None:
        """The peer has a record, perhaps a changed one. After `start`, on the event loop."""
        assert self._links is not None, "start comes first"
        if peer.member != self._member:
            self.store.on_member_present(peer.member)
            self._links.keep(peer)

    def close(self, peer: Member) -> None:
        """The peer's record is gone; its replicas here are kept for `store.RETENTION_S`. After
        `start`, on the event loop."""
        assert self._links is not None, "start comes first"
        self.store.on_member_gone(peer, self._clock.now())
        self._links.close(peer)

    async def open_kv_replica_region(self, request: OpenKvReplicaRegion) -> KvReplicaRegionOpened:
        """Implements `control_server.KvReplicaHost`."""
        address = num_slots = 0
        refusal = ""
        try:
            # Off the event loop: registering memory may take long.
            region = await asyncio.to_thread(self.store.give, request, self._clock.now())
            address, num_slots = region.address, region.num_slots
        except (ValueError, MemoryError) as error:
            refusal = str(error)
        return KvReplicaRegionOpened(
            target=self._member,
            source=request.source,
            generation=request.generation,
            transfer_name=self._transport.name,
            address=address,
            num_slots=num_slots,
            refusal=refusal,
        )

    def on_replicas_stored(self, kept: KvReplicasStored) -> None:
        """Implements `control_server.KvReplicaHost`."""
        try:
            self.store.keep(kept)
        except ValueError as error:
            raise WireError(str(error)) from error

    async def drop_kv_replicas(self, request: DropKvReplicas) -> KvReplicasDropped:
        """Implements `control_server.KvReplicaHost`. After the answer the source may write to the
        slots."""
        try:
            dropping = self.store.drop(request)
        except ValueError as error:
            raise WireError(str(error)) from error
        until = self._clock.now() + READERS_TIMEOUT_S
        while not dropping.is_done():
            if self._clock.now() >= until:
                raise WireError("slots that are to be dropped are still being read")
            await asyncio.sleep(READERS_POLL_S)
        return KvReplicasDropped(
            source=request.source, generation=request.generation, slots=request.slots
        )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            await asyncio.to_thread(self.store.sweep, self._clock.now())
