"""A rank's end of KV replication in a process of its own, driven over a pipe. Tests of the
transport start, kill and stop such processes. A block's content is a function of its name."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import structlog

from gpu_worker.control_server import ControlServer
from gpu_worker.engine.engine_client import EngineCallbacks, EngineClient
from gpu_worker.engine.engine_thread import EngineThread
from gpu_worker.engine.kv_replication import Bytes, ReplicaChannel
from gpu_worker.engine.no_kv_replication import NoKvReplication
from gpu_worker.engine.step_runner import ModelRunner, RunnerParts
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks
from gpu_worker.exchange.interface import StepMonitor
from gpu_worker.exchange.links import TransferEndpoint
from gpu_worker.exchange.message import MessageLayout
from gpu_worker.kv_replication.data_transport import DataTransport
from gpu_worker.kv_replication.mooncake_replicator import MooncakeReplicator
from shared.clock import SystemClock
from shared.confinement import require_confined
from shared.handshake import Access
from shared.records import RankRecord
from shared.types import Member, NodeId, RankId, RankState
from tests.support.local_exchange import LocalHub
from tests.unit.gpu_worker.engine.toy import HIDDEN, ToyModel, scheduler

BLOCK_BYTES = 96 << 10
NUM_SLOTS = 24
NUM_NAMES = 64  # a flood uses these over and over
HOST = "127.0.0.1"
ACCESS = Access("test")
POLL_S = 0.001


def flood_name(source: int, number: int) -> bytes:
    return b"flood-%d-%d" % (source, number % NUM_NAMES)


def content_of(name: bytes) -> Bytes:
    """Random bytes: no two parts of a block are equal, and no two blocks share a part."""
    seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "big")
    return np.random.default_rng(seed).integers(0, 256, BLOCK_BYTES, dtype=np.uint8)


class NamedBlocks:
    """Implements `engine.kv_replication.BlockCache`, except that blocks are looked up by name."""

    block_bytes = BLOCK_BYTES

    def __init__(self, layout: str) -> None:
        self.layout = layout
        self._staging_buffers: list[Bytes] = []
        self._contents: dict[bytes, Bytes] = {}

    def staging_buffer(self) -> Bytes:
        self._staging_buffers.append(np.zeros(BLOCK_BYTES, dtype=np.uint8))
        return self._staging_buffers[-1]

    def content(self, name: bytes) -> Bytes:
        if name not in self._contents:
            self._contents[name] = content_of(name)
        return self._contents[name]

    def save(self, block: int, into: Bytes) -> Callable[[], bool]:
        raise NotImplementedError

    def load(self, block: int, content: Bytes) -> None:
        raise NotImplementedError


def idle_engine(member: Member) -> EngineClient:
    """A real one that nobody starts: links and replicas need its answers to probes alone."""
    clock = SystemClock()
    hub = LocalHub(num_ranks=1, hidden_size=HIDDEN, top_k=1)

    def make_runner(monitor: StepMonitor, _: GraphBarrierCallbacks) -> RunnerParts:
        return RunnerParts(ModelRunner(ToyModel(), hub.exchange(member, monitor, clock, 1e9)))

    def fail(*_: object) -> None:
        raise NotImplementedError

    return EngineClient(
        member=member,
        executor=EngineThread(),
        make_runner=make_runner,
        scheduler=scheduler(),
        replicator=NoKvReplication(),
        clock=clock,
        callbacks=EngineCallbacks(
            send_tokens=fail,
            send_wake=fail,
            send_update=fail,
            suspect=fail,
            adopted=fail,
            held=fail,
            stopped=fail,
        ),
    )


@dataclass
class Flood:
    """Sends without end over one channel, and drops every slot as soon as its name is known."""

    channel: ReplicaChannel
    free: list[int] = field(default_factory=list)
    slots: dict[bytes, int] = field(default_factory=dict)
    num_sent: int = 0
    number: int = 0

    def pump(self, source: int, cache: NamedBlocks) -> None:
        for name in self.channel.take_sent():
            self.num_sent += 1
            self.channel.drop([self.slots.pop(name)])
        self.free += self.channel.take_dropped()
        while self.free and flood_name(source, self.number) not in self.slots:
            staging_buffer = self.channel.take_staging_buffer()
            if staging_buffer is None:
                return
            name, slot = flood_name(source, self.number), self.free.pop(0)
            staging_buffer[:] = cache.content(name)
            self.slots[name] = slot
            self.number += 1
            self.channel.send(staging_buffer, slot, name, lambda: True)


class Stranger:
    """Writes over Mooncake to memory that others have registered: it asks nobody who it is."""

    def __init__(self, transport: DataTransport) -> None:
        self._engine = transport.engine
        self._junk = np.full(1, 0xFF, dtype=np.uint8)
        assert self._engine.register_memory(int(self._junk.ctypes.data), 1) == 0

    def overwrite(self, transfer_name: str, address: int) -> bool:
        """One byte. Whether the target has acknowledged it."""
        batch = self._engine.transfer_submit_write(
            transfer_name, int(self._junk.ctypes.data), address, 1
        )
        while (status := self._engine.transfer_check_status(batch)) == 0:
            time.sleep(POLL_S)
        return bool(batch) and status == 1


class _Child:
    """One thread plays the engine; the event loop runs on the main thread."""

    def __init__(self, member: Member, pipe: Connection, layout: str, keeps: bool) -> None:
        self.member = member
        self.pipe = pipe
        self.cache = NamedBlocks(layout)
        # As in a rank, beside the engine of the replicator.
        self.exchange = TransferEndpoint(
            HOST, MessageLayout(hidden_size=4, top_k=2, step_tokens_max=4), SystemClock()
        )
        transport = DataTransport(HOST, SystemClock())
        self.stranger = Stranger(transport)
        require_confined()
        self.replicator = MooncakeReplicator(
            member=member,
            access=ACCESS,
            node=NodeId(f"node-{member.rank % 2}"),
            transport=transport,
            cache=self.cache,
            budget_bytes=2 * NUM_SLOTS * BLOCK_BYTES,
            num_ranks=3,
        )
        self.keeps = keeps
        self.floods: dict[RankId, Flood] = {}
        self.lock = threading.Lock()
        self.verified = [0, 0]  # number of blocks checked, of wrong ones

    def send(self, kind: str, value: object) -> None:
        with self.lock:
            self.pipe.send((kind, value))

    def record(self, port: int) -> RankRecord:
        return RankRecord(
            rank=self.member.rank,
            incarnation=self.member.incarnation,
            node=NodeId(f"node-{self.member.rank % 2}"),
            pid=1,
            lease_id=1,
            state=RankState.READY,
            control_host=HOST,
            control_port=port,
            transfer_name=self.exchange.name,
            slots=1,
            kv_blocks=1,
            kv_block_tokens=1,
            exchange="transfer",
        )

    async def run(self) -> None:
        server = ControlServer(
            member=self.member,
            access=ACCESS,
            knows=lambda member: True,
            engine=idle_engine(self.member),
            endpoint=self.exchange,
            replication=self.replicator if self.keeps else None,
        )
        port = await server.start(HOST, 0)
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            self.replicator.start(tasks)
            self.send("record", self.record(port))
            await loop.run_in_executor(None, self.serve, loop)
            raise SystemExit

    def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                if self.pipe.poll(POLL_S):
                    kind, value = self.pipe.recv()
                    if kind in ("keep", "close"):
                        loop.call_soon_threadsafe(getattr(self.replicator, kind), value)
                    else:
                        self.handle(kind, value)
            except EOFError:
                return
            for flood in self.floods.values():
                if flood.channel.is_open:
                    flood.pump(self.member.rank, self.cache)
            self.verify_found_blocks()

    def handle(self, kind: str, value: Any) -> None:
        channels = self.replicator.channels()
        match kind:
            case "channels":
                self.send(
                    kind, {int(r): (c.is_on_other_node, c.num_slots) for r, c in channels.items()}
                )
            case "send":
                rank, slot, name = value
                self.send_block(channels[rank], slot, name)
            case "sent":
                self.send(kind, list(channels[value].take_sent()))
            case "drop":
                rank, slots = value
                channels[rank].drop(slots)
            case "dropped":
                self.send(kind, list(channels[value].take_dropped()))
            case "find":
                found = self.replicator.store.find(value)
                equal = None if found is None else bool((found == content_of(value)).all())
                self.send(kind, equal)
            case "rejected":
                self.send(kind, self.replicator.store.num_rejected)
            case "slot_address":
                rank, slot = value
                remote = channels[rank].remote
                self.send(kind, (remote.transfer_name, remote.address + slot * BLOCK_BYTES))
            case "overwrite":
                self.send(kind, self.stranger.overwrite(*value))
            case "flood":
                channel = channels[value]
                self.floods[value] = Flood(channel, free=list(range(channel.num_slots)))
            case "flooded":
                flood = self.floods[value]
                self.send(kind, (flood.channel.is_open, flood.num_sent))
            case "verified":
                self.send(kind, tuple(self.verified))

    def send_block(self, channel: ReplicaChannel, slot: int, name: bytes) -> None:
        while (staging_buffer := channel.take_staging_buffer()) is None:
            assert channel.is_open
            time.sleep(POLL_S)
        staging_buffer[:] = self.cache.content(name)
        channel.send(staging_buffer, slot, name, lambda: True)

    def verify_found_blocks(self) -> None:
        """Checks the blocks of floods here, while they are being written and dropped."""
        for source in range(3):
            for number in range(NUM_NAMES):
                name = flood_name(source, number)
                found = self.replicator.store.find(name)
                if found is not None:
                    self.verified[0] += 1
                    self.verified[1] += not (found == self.cache.content(name)).all()


def main(member: Member, pipe: Connection, layout: str, keeps: bool) -> None:
    def report(_: object, __: str, event: MutableMapping[str, Any]) -> str:
        child.send("log", dict(event))
        return ""

    child = _Child(member, pipe, layout, keeps)
    structlog.configure(processors=[report], logger_factory=structlog.ReturnLoggerFactory())
    asyncio.run(child.run())
