"""A rank's real control port on a loopback socket, without a rank behind it: an idle engine, and an
endpoint that counts the regions it gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gpu_worker.control_server import ControlServer
from gpu_worker.engine.engine_client import EngineClient
from shared.handshake import Access, Caller, introduce, rank_caller
from shared.records import RankRecord
from shared.types import GivenRegion, Incarnation, Member, NodeId, RankId, RankState
from shared.wire import Message, Ping, Pong, RegionOpened, encode, read_message
from tests.support.kv_replication_child import idle_engine

HOST = "127.0.0.1"
RANK = Member(rank=RankId(0), incarnation=Incarnation(1))
PEER = Member(rank=RankId(1), incarnation=Incarnation(1))
ACCESS = Access("blue", b"blue is the secret, 32 characters")


@dataclass
class CountingEndpoint:
    """Implements `link_keeper.DataEndpoint`."""

    name: str = "counting"
    given: list[tuple[Member, int]] = field(default_factory=list)

    def next_generation(self, target: Member) -> int:
        return 1

    def open_region(self, source: Member, generation: int) -> GivenRegion:
        self.given.append((source, generation))
        return GivenRegion(4096, 1)

    def connect(self, region: RegionOpened, peer: RankRecord) -> None: ...

    @property
    def memory_links(self) -> tuple[Member, ...]:
        return ()

    def is_open(self, target: Member) -> bool:
        return False

    def forget(self, member: Member) -> None: ...

    def sweep(self) -> None: ...


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.writer.write(encode(message))

    async def next(self) -> Message | None:
        """None also for a reset."""
        try:
            async with asyncio.timeout(10):
                return await read_message(self.reader)
        except ConnectionError:
            return None

    async def is_served(self) -> bool:
        """Whether what was sent so far has not ended the connection."""
        self.send(Ping(nonce=77))
        return isinstance(await self.next(), Pong)


class ControlPort:
    def __init__(
        self, port: int, endpoint: CountingEndpoint, known: set[Member], engine: EngineClient
    ) -> None:
        self.port, self.endpoint, self.known = port, endpoint, known
        self._engine = engine
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def tenants(self) -> frozenset[str]:
        """Those that gateways have in flight, as the engine reads it."""
        return self._engine.tenants

    @property
    def record(self) -> RankRecord:
        return record_of(RANK, self.port)

    async def connect(self) -> Connection:
        """Without a handshake."""
        connection = Connection(*await asyncio.open_connection(HOST, self.port))
        self._writers = [writer for writer in self._writers if not writer.is_closing()]
        self._writers.append(connection.writer)
        return connection

    async def enter(self, caller: Caller, access: Access = ACCESS) -> Connection:
        """With one. Raises what `introduce` raises."""
        connection = await self.connect()
        async with asyncio.timeout(10):
            await introduce(caller, self.record, access, connection.reader, connection.writer)
        return connection

    async def enter_as_peer(self, member: Member = PEER) -> Connection:
        return await self.enter(rank_caller(member))

    async def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def control_port(
    access: Access = ACCESS, known: Iterable[Member] = (PEER,)
) -> AsyncIterator[ControlPort]:
    endpoint, members, engine = CountingEndpoint(), set(known), idle_engine(RANK)
    server = ControlServer(
        member=RANK,
        access=access,
        knows=members.__contains__,
        engine=engine,
        endpoint=endpoint,
    )
    port = ControlPort(await server.start(HOST, 0), endpoint, members, engine)
    try:
        yield port
    finally:
        await port.close()
        await server.close()
        await asyncio.sleep(0.01)


def record_of(member: Member, port: int) -> RankRecord:
    return RankRecord(
        rank=member.rank,
        incarnation=member.incarnation,
        node=NodeId("n"),
        pid=1,
        lease_id=1,
        state=RankState.READY,
        control_host=HOST,
        control_port=port,
        transfer_name="t",
        slots=1,
        kv_blocks=1,
        kv_block_tokens=1,
        exchange="transfer",
    )
