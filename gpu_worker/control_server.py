"""The rank's control port: sessions from gateways, probes, links from peers, each a connection of
framed messages. What a message means to the engine is the `EngineClient`'s."""

from __future__ import annotations

import asyncio
import itertools
from typing import Protocol

import structlog

from gpu_worker.engine.engine_client import EngineClient
from gpu_worker.engine.mailbox import StepTokens
from gpu_worker.engine.sequence import Origin
from gpu_worker.membership.link_keeper import DataEndpoint
from shared.errors import WireError
from shared.types import Epoch, Member, Step
from shared.wire import (
    Cancel,
    DropKvReplicas,
    GraphBarrierUpdate,
    Hello,
    KvReplicaRegionOpened,
    KvReplicasDropped,
    KvReplicasStored,
    Load,
    Message,
    OpenKvReplicaRegion,
    OpenRegion,
    Ping,
    RegionOpened,
    SessionTokens,
    StatusQuery,
    Submit,
    Tokens,
    Wake,
    Welcome,
    encode,
    read_message,
)

log = structlog.get_logger()

HELLO_TIMEOUT_S = 5.0
UNSENT_BYTES_MAX = 8 << 20


class KvReplicaHost(Protocol):
    """Gives peers memory for replicas of their KV blocks. Raises WireError if a message contradicts
    what this rank knows."""

    async def open_kv_replica_region(
        self, request: OpenKvReplicaRegion
    ) -> KvReplicaRegionOpened: ...

    def on_replicas_stored(self, kept: KvReplicasStored) -> None: ...

    async def drop_kv_replicas(self, request: DropKvReplicas) -> KvReplicasDropped:
        """Returns when the slots may be written to."""
        ...


class ControlServer:
    """Owns the listener and its connections. The engine knows a connection by its `Origin`. Without
    `replication`, the rank refuses to keep KV replicas for its peers."""

    def __init__(
        self,
        *,
        member: Member,
        engine: EngineClient,
        endpoint: DataEndpoint,
        replication: KvReplicaHost | None = None,
    ) -> None:
        self._member = member
        self._engine = engine
        self._endpoint = endpoint
        self._replication = replication
        self._origins = itertools.count(1)
        self._writers: dict[Origin, asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None
        self._closed = False

    async def start(self, host: str, port: int) -> int:
        """Listens; returns the port. Raises OSError if it is taken."""
        self._server = await asyncio.start_server(self._serve, host, port, backlog=256)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Nobody reaches this incarnation any more, though its process may live on."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers.values()):
            writer.close()

    def send_tokens(self, tokens: StepTokens) -> None:
        """Sends the tokens of one committed step, one frame to each gateway."""
        for origin, sessions in tokens.sessions.items():
            writer = self._writers.get(origin)
            if writer is None:
                continue
            writer.write(self._tokens(sessions, tokens.epoch, tokens.step, tokens.load))
            if writer.transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
                log.error("gateway_too_slow", origin=origin)
                writer.transport.abort()

    def _tokens(
        self, sessions: tuple[SessionTokens, ...], epoch: Epoch, step: Step, load: Load
    ) -> bytes:
        return encode(
            Tokens(
                rank=self._member.rank,
                incarnation=self._member.incarnation,
                epoch=epoch,
                step=step,
                sessions=sessions,
                load=load,
            )
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed:  # it was accepted before
            writer.close()
            return
        origin = Origin(next(self._origins))
        self._writers[origin] = writer
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await read_message(reader)
            if not isinstance(hello, Hello):
                raise WireError("the first frame must be Hello")
            writer.write(
                encode(Welcome(rank=self._member.rank, incarnation=self._member.incarnation))
            )
            while (message := await read_message(reader)) is not None:
                if isinstance(message, OpenKvReplicaRegion | KvReplicasStored | DropKvReplicas):
                    reply = await self._answer_on_kv_replicas(message)
                else:
                    reply = self._answer(origin, message)
                if reply is not None:
                    writer.write(encode(reply))
                    await writer.drain()
        except (WireError, TimeoutError) as error:
            log.warning("bad_peer", origin=origin, detail=str(error) or "no Hello in time")
        except ConnectionError:
            pass
        finally:
            del self._writers[origin]
            self._engine.drop_origin(origin)
            writer.close()

    def _answer(self, origin: Origin, message: Message) -> Message | None:
        match message:
            case Submit():
                if not self._engine.submit(origin, message):
                    return self._refusal(message)
            case Cancel():
                if not self._engine.cancel(message):
                    raise WireError("more cancellations than the engine can take")
            case Wake():
                self._engine.wake(message)
            case GraphBarrierUpdate():
                self._engine.on_graph_update(message)
            case Ping():
                return self._engine.pong(message)
            case OpenRegion():
                return self._open_region(message)
            case StatusQuery():
                return self._engine.status(message)
            case _:
                raise WireError(f"{type(message).__name__} is not for a rank")
        return None

    def _open_region(self, request: OpenRegion) -> RegionOpened:
        address, nbytes = self._endpoint.open_region(request.source, request.generation)
        return RegionOpened(
            target=self._member,
            source=request.source,
            generation=request.generation,
            transfer_name=self._endpoint.name,
            address=address,
            nbytes=nbytes,
        )

    async def _answer_on_kv_replicas(
        self, message: OpenKvReplicaRegion | KvReplicasStored | DropKvReplicas
    ) -> Message | None:
        match message, self._replication:
            case OpenKvReplicaRegion(), None:
                return self._refuse_kv_replica_region(message)
            case _, None:
                raise WireError("this rank keeps no KV replicas")
            case OpenKvReplicaRegion(), replication:
                return await replication.open_kv_replica_region(message)
            case DropKvReplicas(), replication:
                return await replication.drop_kv_replicas(message)
            case KvReplicasStored(), replication:
                replication.on_replicas_stored(message)
        return None

    def _refuse_kv_replica_region(self, request: OpenKvReplicaRegion) -> KvReplicaRegionOpened:
        return KvReplicaRegionOpened(
            target=self._member,
            source=request.source,
            generation=request.generation,
            transfer_name="",
            address=0,
            num_slots=0,
            refusal="this rank keeps no KV replicas",
        )

    def _refusal(self, submit: Submit) -> Tokens:
        refused = SessionTokens(
            session=submit.session,
            attempt=submit.attempt,
            index=submit.num_emitted,
            ids=(),
            error="the rank's inbox is full",
            retryable=True,
        )
        return Tokens(
            rank=self._member.rank,
            incarnation=self._member.incarnation,
            epoch=Epoch(0),
            step=Step(0),
            sessions=(refused,),
            load=self._engine.load(),
        )
