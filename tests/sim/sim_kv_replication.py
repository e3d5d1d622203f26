"""Copies of KV blocks in the simulated cluster: the real writer, ledger and scheduler over regions
whose writes come in two halves, late, and are lost with their sender or behind a cut. Whoever
writes to a slot that is known by a name breaks an invariant: a client would see other tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.kv_replication import Bytes, ReplicaChannel
from shared.records import RankRecord
from shared.types import Member, RankId
from shared.wire import (
    DropKvReplicas,
    KvReplicaRegionOpened,
    KvReplicasDropped,
    KvReplicasStored,
    OpenKvReplicaRegion,
)
from tests.sim.sim_loop import SimProcess
from tests.sim.sim_network import SimNetwork

NUM_SLOTS = 12  # so few that slots are dropped and written anew
NUM_STAGING_BUFFERS = 4
BLOCK_VALUE_BYTES = 8


class SimBlockCache:
    """Implements `copies.ports.BlockCache` over the model's keys."""

    layout = "sim"

    def __init__(self, keys: NDArray[np.int64], block_tokens: int) -> None:
        self._blocks = keys.reshape(-1, block_tokens)
        self.block_bytes = block_tokens * BLOCK_VALUE_BYTES

    def staging_buffer(self) -> Bytes:
        return np.zeros(self.block_bytes, dtype=np.uint8)

    def save(self, block: int, into: Bytes) -> Callable[[], bool]:
        into[:] = self._blocks[block].view(np.uint8)
        return lambda: True

    def load(self, block: int, content: Bytes) -> None:
        self._blocks[block] = content.view(np.int64)


@dataclass
class _Region:
    """What one life of a source has at a target."""

    slots: dict[int, Bytes] = field(default_factory=dict)
    known: dict[bytes, int] = field(default_factory=dict)


class SimStore:
    """Implements `copies.ports.ReplicaStore`. Gone with its process."""

    def __init__(self) -> None:
        self.regions: dict[tuple[Member, int], _Region] = {}
        self.num_found = 0

    num_rejected = 0

    def find(self, name: bytes) -> Bytes | None:
        for region in self.regions.values():
            if name in region.known:
                self.num_found += 1
                return region.slots[region.known[name]]
        return None


class KvReplicaHub:
    """All ranks' stores, and who can write to whom."""

    def __init__(self, network: SimNetwork) -> None:
        self.network = network
        self._process_of: dict[Member, SimProcess] = {}
        self._store_of: dict[Member, SimStore] = {}

    @property
    def num_found(self) -> int:
        """Blocks that were restored, in all lives."""
        return sum(store.num_found for store in self._store_of.values())

    def endpoint(self, member: Member, process: SimProcess, block_bytes: int) -> SimKvReplicator:
        self._process_of[member] = process
        self._store_of[member] = SimStore()
        return SimKvReplicator(self, member, block_bytes)

    def store_of(self, member: Member) -> SimStore:
        return self._store_of[member]

    def peers_of(self, member: Member) -> list[Member]:
        """The newest life of each rank, where it can be reached."""
        newest = {m.rank: m for m in sorted(self._process_of)}
        return [m for m in newest.values() if m != member and self.can_reach(member, m)]

    def can_reach(self, source: Member, target: Member) -> bool:
        sender, receiver = self._process_of[source], self._process_of[target]
        return not receiver.dead and self.network.reachable(sender.host, receiver.host)


class SimKvReplicator:
    """Implements `rank.KvReplicaEndpoint`. Channels open by themselves: what ranks say to each
    other over a real one is not simulated."""

    def __init__(self, hub: KvReplicaHub, member: Member, block_bytes: int) -> None:
        self._hub = hub
        self._member = member
        self._block_bytes = block_bytes
        self._channels: dict[RankId, SimChannel] = {}
        self._generation = 0

    @property
    def store(self) -> SimStore:
        return self._hub.store_of(self._member)

    def channels(self) -> Mapping[RankId, ReplicaChannel]:
        for peer in self._hub.peers_of(self._member):
            old = self._channels.get(peer.rank)
            if old is None or not old.is_open or old.target != peer:
                self._generation += 1
                self._channels[peer.rank] = SimChannel(
                    self._hub, self._member, peer, self._generation, self._block_bytes
                )
        return {rank: c for rank, c in self._channels.items() if c.is_open}

    def start(self, tasks: asyncio.TaskGroup) -> None: ...

    def keep(self, peer: RankRecord) -> None: ...

    def close(self, peer: Member) -> None: ...

    async def open_kv_replica_region(self, request: OpenKvReplicaRegion) -> KvReplicaRegionOpened:
        raise NotImplementedError

    def on_replicas_stored(self, kept: KvReplicasStored) -> None:
        raise NotImplementedError

    async def drop_kv_replicas(self, request: DropKvReplicas) -> KvReplicasDropped:
        raise NotImplementedError


class SimChannel:
    """Implements `copies.ports.ReplicaChannel`."""

    is_on_other_node = True
    num_slots = NUM_SLOTS

    def __init__(
        self, hub: KvReplicaHub, source: Member, target: Member, generation: int, block_bytes: int
    ) -> None:
        self._hub = hub
        self._source = source
        self.target = target
        self._staging_buffers = [
            np.zeros(block_bytes, dtype=np.uint8) for _ in range(NUM_STAGING_BUFFERS)
        ]
        self._sent: list[bytes] = []
        self._dropped: list[int] = []
        self._broken = False
        self._region = hub.store_of(target).regions.setdefault((source, generation), _Region())

    @property
    def is_open(self) -> bool:
        self._broken = self._broken or not self._hub.can_reach(self._source, self.target)
        return not self._broken

    def take_staging_buffer(self) -> Bytes | None:
        return self._staging_buffers.pop() if self._staging_buffers else None

    def send(
        self, staging_buffer: Bytes, slot: int, name: bytes, is_saved: Callable[[], bool]
    ) -> None:
        assert is_saved()
        self._later(lambda: self._write_half(staging_buffer, slot, name))

    @property
    def has_confirmations(self) -> bool:
        return bool(self._sent or self._dropped)

    def take_sent(self) -> Sequence[bytes]:
        sent, self._sent = self._sent, []
        return sent

    def drop(self, slots: Sequence[int]) -> None:
        def forget() -> None:
            gone = set(slots)
            self._region.known = {n: s for n, s in self._region.known.items() if s not in gone}
            self._later(lambda: self._dropped.extend(slots))

        self._later(forget)

    def take_dropped(self) -> Sequence[int]:
        dropped, self._dropped = self._dropped, []
        return dropped

    def _write_half(self, staging_buffer: Bytes, slot: int, name: bytes) -> None:
        known = [each.hex() for each, place in self._region.known.items() if place == slot]
        assert not known, f"{self._source} overwrites {known} while {self.target} knows of it"
        content = self._region.slots.setdefault(slot, np.zeros_like(staging_buffer))
        half = len(staging_buffer) // 2
        content[:half] = staging_buffer[:half]
        self._later(lambda: self._write_rest(staging_buffer, slot, name))

    def _write_rest(self, staging_buffer: Bytes, slot: int, name: bytes) -> None:
        half = len(staging_buffer) // 2
        self._region.slots[slot][half:] = staging_buffer[half:]
        self._staging_buffers.append(staging_buffer)

        def know() -> None:
            self._region.known[name] = slot
            self._sent.append(name)

        self._later(know)

    def _later(self, act: Callable[[], None]) -> None:
        """Of this process: lost with it, late when it is stopped, and nothing on a broken way."""

        def arrive() -> None:
            if self.is_open:
                act()

        network = self._hub.network
        network.loop.call_later(network.latency_s(), arrive)
