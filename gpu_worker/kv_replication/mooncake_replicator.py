"""This rank's end of all copies over Mooncake: what it keeps for its peers, and its channels to
them. Implements `engine.kv_replication.ReplicaEndpoint` and `control_server.KvReplicaHost`. Which
blocks are sent is not decided here.

It has an engine of its own, so that neither first contact with a peer nor a write to one that hangs
stands in the way of the exchange's. Engine, regions and rooms go with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import threading
from collections.abc import Callable, Mapping

import numpy as np

from gpu_worker.engine.kv_replication import BlockCache
from gpu_worker.exchange.connect_write import connect_write
from gpu_worker.exchange.mooncake_engine import Protocols, open_engine
from gpu_worker.kv_replication.block_form import BlockForm
from gpu_worker.kv_replication.channel import Channel, RemoteSlots, WakeCallbacks
from gpu_worker.kv_replication.region import SCRATCH_BYTES
from gpu_worker.kv_replication.replica_links import ReplicaLinks
from gpu_worker.kv_replication.sender import Sender
from gpu_worker.kv_replication.staging_buffer import StagingBuffers
from gpu_worker.kv_replication.store import StoredReplicas
from shared.clock import Clock
from shared.errors import ConfigError, WireError
from shared.records import RankRecord
from shared.types import Member, NodeId, RankId
from shared.wire import (
    DropKvReplicas,
    KvReplicaRegionOpened,
    KvReplicasDropped,
    KvReplicasStored,
    OpenKvReplicaRegion,
)

CONTACT_TIMEOUT_S = 5.0
SWEEP_S = 5.0
READERS_POLL_S = 0.001
READERS_TIMEOUT_S = 2.0
"""The engine lets go of what it has found when it has planned a step."""


class MooncakeReplicator:
    """Opened in three steps: Mooncake's engine at once, because it binds its port on this thread,
    before anybody checks that the rank's listeners are confined; `open`, when the model is loaded;
    `start`, when peers may come."""

    def __init__(
        self,
        *,
        member: Member,
        node: NodeId,
        host: str,
        clock: Clock,
        num_ranks: int,
        protocol: Protocols = Protocols.TCP,
        device: str = "",
    ) -> None:
        """Raises ConfigError."""
        self._member = member
        self._node = node
        self._clock = clock
        self._num_peers = max(1, num_ranks - 1)
        self._engine, self._name = open_engine(host, protocol, device)
        self._sender = Sender(self._engine, clock)
        self._scratch = np.frombuffer(mmap.mmap(-1, SCRATCH_BYTES), dtype=np.uint8)
        if self._engine.register_memory(int(self._scratch.ctypes.data), SCRATCH_BYTES) != 0:
            raise ConfigError("Mooncake cannot register memory")
        self._form: BlockForm | None = None
        self._store: StoredReplicas | None = None
        self._staging_buffers: StagingBuffers | None = None
        self._links: ReplicaLinks | None = None
        self._contact = asyncio.Lock()

    def open(self, cache: BlockCache, budget_bytes: int) -> None:
        """`budget_bytes` is for the copies of all peers together. May block. Raises OSError where
        there is no memory to send from."""
        self._form = BlockForm(layout=cache.layout, block_bytes=cache.block_bytes)
        self._staging_buffers = StagingBuffers(cache.staging_buffer, self._engine)
        self._store = StoredReplicas(self._engine, self._form, budget_bytes // self._num_peers)
        self._sender.start()

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """After `open`, on the event loop. `tasks` owns what runs from now on."""
        assert self._form is not None, "open comes before start"
        self._links = ReplicaLinks(member=self._member, form=self._form, data=self, tasks=tasks)
        tasks.create_task(self._sweep())

    @property
    def store(self) -> StoredReplicas:
        assert self._store is not None, "open comes first"
        return self._store

    def channels(self) -> Mapping[RankId, Channel]:
        """Any thread."""
        if self._links is None:
            return {}
        return {rank: c for rank, c in self._links.channels.items() if c.is_open}

    def keep(self, peer: RankRecord) -> None:
        """The peer has a record, or another one. Event loop."""
        assert self._links is not None, "start comes first"
        if peer.member != self._member:
            self.store.on_member_present(peer.member)
            self._links.keep(peer)

    def close(self, peer: Member) -> None:
        """Its record is gone; what it has left here is kept for a while. Event loop."""
        assert self._links is not None, "start comes first"
        self.store.on_member_gone(peer, self._clock.now())
        self._links.close(peer)

    async def open_kv_replica_region(self, request: OpenKvReplicaRegion) -> KvReplicaRegionOpened:
        """Implements `control_server.KvReplicaHost`."""
        address = num_slots = 0
        refusal = ""
        try:
            # A registration may take its time.
            region = await asyncio.to_thread(self.store.give, request, self._clock.now())
            address, num_slots = region.address, region.num_slots
        except (ValueError, MemoryError) as error:
            refusal = str(error)
        return KvReplicaRegionOpened(
            target=self._member,
            source=request.source,
            generation=request.generation,
            transfer_name=self._name,
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
        """Implements `control_server.KvReplicaHost`: the slots may be written to after the
        answer."""
        try:
            dropping = self.store.drop(request)
        except ValueError as error:
            raise WireError(str(error)) from error
        until = self._clock.now() + READERS_TIMEOUT_S
        while not dropping.is_done():
            if self._clock.now() >= until:
                raise WireError("slots that shall be dropped are being read")
            await asyncio.sleep(READERS_POLL_S)
        return KvReplicasDropped(
            source=request.source, generation=request.generation, slots=request.slots
        )

    async def contact(self, opened: KvReplicaRegionOpened) -> None:
        """Implements `replica_links.DataTransport`. On a daemon thread: where Mooncake blocks for
        a minute, nobody has to wait for it. One at a time, because meanwhile it would block all
        others."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()
        async with asyncio.timeout(CONTACT_TIMEOUT_S):
            await self._contact.acquire()

        def settle(error: str) -> None:
            self._contact.release()
            if not ended.done():
                ended.set_result(error)

        def write() -> None:
            until = self._clock.now() + CONTACT_TIMEOUT_S
            error = connect_write(
                self._engine, lambda: self._submit_connect_write(opened), self._clock, until
            )
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(settle, error)

        threading.Thread(target=write, name=f"copies-{opened.target}", daemon=True).start()
        async with asyncio.timeout(2 * CONTACT_TIMEOUT_S):
            error = await ended
        if error:
            raise ConnectionError(f"the first write to rank {opened.target} {error}")

    def channel(
        self, peer: RankRecord, opened: KvReplicaRegionOpened, ring: Callable[[], None]
    ) -> Channel:
        """Implements `replica_links.DataTransport`."""
        assert self._form is not None, "open comes first"
        assert self._staging_buffers is not None
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
            remote, self._staging_buffers, WakeCallbacks(sender=self._sender.notify, link=ring)
        )

    def _submit_connect_write(self, opened: KvReplicaRegionOpened) -> int:
        assert self._form is not None, "open comes first"
        behind = opened.address + opened.num_slots * self._form.block_bytes
        return self._engine.transfer_submit_write(
            opened.transfer_name, int(self._scratch.ctypes.data), behind, SCRATCH_BYTES
        )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            await asyncio.to_thread(self.store.sweep, self._clock.now())
