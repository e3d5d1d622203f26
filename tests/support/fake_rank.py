"""A rank without an engine, for tests of components that talk to ranks. It registers, links, loads
its assignment and answers probes over real sockets. It can die or hang."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

from shared.errors import LeaseLost, StoreUnavailable, WireError
from shared.expert_map import ExpertMap
from shared.handshake import admit
from shared.keys import Keys
from shared.records import (
    RankRecord,
    SlotContents,
    Suspicion,
    pack_record,
    unpack_map,
    unpack_record,
)
from shared.store import Snapshot, Store
from shared.types import Accuser, Epoch, Incarnation, Member, NodeId, RankId, RankState, Step
from shared.wire import Load, Ping, Pong, encode, read_message
from tests.support.authentication import access_to

LOAD = Load(running=0, waiting=0, tokens=0, kv_blocks_free=8, kv_blocks=8)


class FakeRank:
    """One incarnation. Call `start`, then `kill`, `hang` or `stop`; always call `stop` at the
    end."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        *,
        rank: int,
        incarnation: int = 1,
        slots: int = 4,
        node: str = "n0",
        lease_ttl_s: float = 5.0,
    ) -> None:
        self._store, self._keys, self._ttl_s = store, keys, lease_ttl_s
        self.member = Member(rank=RankId(rank), incarnation=Incarnation(incarnation))
        self._slots, self._node = slots, NodeId(node)
        self.lease_id = 0
        self.record: RankRecord | None = None
        self.expert_map: ExpertMap | None = None
        self.loads: list[SlotContents] = []
        self.loads_allowed = asyncio.Event()
        self.loads_allowed.set()
        self.answering = True
        self.engine_age_ms = 1.0
        self._peers: set[Member] = set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.lease_id = await self._store.grant_lease(self._ttl_s)
        self.record = RankRecord(
            rank=self.member.rank,
            incarnation=self.member.incarnation,
            node=self._node,
            pid=1,
            lease_id=self.lease_id,
            state=RankState.STARTING,
            control_host="127.0.0.1",
            control_port=self._server.sockets[0].getsockname()[1],
            transfer_name="none",
            slots=self._slots,
            kv_blocks=8,
            kv_block_tokens=16,
            exchange="local",
        )
        await self._write_record()
        self._tasks = [
            asyncio.create_task(self._watch()),
            asyncio.create_task(self._keep_alive()),
        ]

    async def kill(self) -> float:
        """Like `kill -9` with a node agent: sockets close and the lease is revoked. Returns the
        time of the request to revoke it."""
        await self.kill_without_agent()
        asked_at = asyncio.get_running_loop().time()
        await self._store.revoke_lease(self.lease_id)
        return asked_at

    async def kill_without_agent(self) -> None:
        """Like `kill -9` without a node agent: sockets close, but the lease stays for its TTL."""
        for task in self._tasks:
            task.cancel()
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    def hang(self) -> None:
        """Like SIGSTOP: connections stay open, nothing is answered, the lease is not renewed."""
        self.answering = False
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def suspect(self, other: Member, suspicion: Suspicion) -> None:
        by = suspicion.by
        key = self._keys.suspicion(other.rank, other.incarnation, Accuser.RANK, by)
        await self._store.put(key, pack_record(suspicion), lease_id=self.lease_id)

    async def _write_record(self) -> None:
        assert self.record is not None
        key = self._keys.rank(self.member.rank, self.member.incarnation)
        await self._store.put(key, pack_record(self.record), lease_id=self.lease_id)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            with suppress(LeaseLost, StoreUnavailable):
                await self._store.keep_alive(self.lease_id)

    async def _watch(self) -> None:
        async for item in self._store.watch(self._keys.root):
            for entry in item.values if isinstance(item, Snapshot) else (item,):
                await self._on_entry(entry.key, entry.value)

    async def _on_entry(self, key: str, value: bytes | None) -> None:
        keys = self._keys
        if key == keys.map and value is not None:
            self.expert_map = unpack_map(value)
        elif key.startswith(keys.ranks):
            rank, incarnation = (int(part) for part in key.removeprefix(keys.ranks).split("/"))
            peer = Member(rank=RankId(rank), incarnation=Incarnation(incarnation))
            if peer != self.member:
                await self._on_peer(peer, here=value is not None)
        elif key == keys.assignment(self.member.rank, self.member.incarnation) and value:
            await self._load(value)

    async def _on_peer(self, peer: Member, *, here: bool) -> None:
        assert self.record is not None
        if here == (peer in self._peers):
            return
        self._peers = self._peers | {peer} if here else self._peers - {peer}
        self.record = replace(self.record, links=tuple(sorted(self._peers)))
        await self._write_record()

    async def _load(self, assignment: bytes) -> None:
        await self.loads_allowed.wait()
        contents = replace(unpack_record(assignment, SlotContents), epoch=Epoch(0))
        self.loads.append(contents)
        key = self._keys.resident(self.member.rank, self.member.incarnation)
        await self._store.put(key, pack_record(contents), lease_id=self.lease_id)
        assert self.record is not None
        self.record = replace(self.record, state=RankState.READY)
        await self._write_record()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if not self.answering:
                await reader.read()
                return
            _, welcome = await admit(self.member, access_to(self._keys.instance), reader, writer)
            writer.write(encode(welcome))
            while (message := await read_message(reader)) is not None:
                if self.answering and isinstance(message, Ping):
                    writer.write(encode(self._pong(message)))
        except (ConnectionError, WireError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _pong(self, ping: Ping) -> Pong:
        return Pong(
            nonce=ping.nonce,
            rank=self.member.rank,
            incarnation=self.member.incarnation,
            epoch=self.expert_map.epoch if self.expert_map else Epoch(0),
            step=Step(0),
            engine_age_ms=self.engine_age_ms,
            waiting_for=(),
            load=LOAD,
        )
