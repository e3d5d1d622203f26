"""The rank's control port: sessions from gateways, probes, links from peers, each a connection of
framed messages. It takes a message only from a process whose role may send it, and only for what is
that process's own: a gateway's sessions, a member's regions. What a message means to the engine is
the `EngineClient`'s."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Protocol

import structlog

from gpu_worker.attempt_reports import AttemptReports
from gpu_worker.engine.engine_client import EngineClient
from gpu_worker.engine.mailbox import StepTokens
from gpu_worker.engine.sequence import Origin
from gpu_worker.membership.link_keeper import DataEndpoint
from shared.errors import WireError
from shared.handshake import Access, Caller, admit
from shared.types import Epoch, Member, Role, SessionId, Step
from shared.wire import (
    FRAME_BYTES_MAX,
    AnnouncedOperation,
    Cancel,
    DropKvReplicas,
    ExpertCounts,
    ExpertCountsQuery,
    GraphBarrierUpdate,
    KvReplicaRegionOpened,
    KvReplicasDropped,
    KvReplicasStored,
    Load,
    Message,
    OfferMap,
    OpenKvReplicaRegion,
    OpenRegion,
    Ping,
    Pong,
    RegionOpened,
    SessionTokens,
    StatusQuery,
    Submit,
    Tokens,
    UnheardPeer,
    Wake,
    encode,
    read_message,
)

log = structlog.get_logger()

HANDSHAKE_TIMEOUT_S = 5.0
STRANGERS_MAX = 64
"""Connections that have not been let in yet. One more ends the oldest of them: who belongs here
needs milliseconds, and must not be kept out by others who wait."""
KNOWN_WITHIN_S = 1.5
KNOWN_POLL_S = 0.01
"""A peer may connect before this rank has seen its record."""
UNSENT_BYTES_MAX = 8 << 20
GENERATION_MAX = 1 << 31
COUNT_MAX = 1 << 48
REFUSALS_LOG_S = 1.0
"""Strangers must not fill the log: of those refused, one is logged in this time."""

MAY_SEND: Mapping[Role, tuple[type[Message], ...]] = {
    Role.GATEWAY: (Submit, Cancel, Ping),
    Role.RANK: (
        Wake,
        GraphBarrierUpdate,
        OpenRegion,
        OpenKvReplicaRegion,
        KvReplicasStored,
        DropKvReplicas,
        Ping,
    ),
    Role.CONTROL_PLANE: (Ping, OfferMap, ExpertCountsQuery),
    Role.CLI: (Ping, StatusQuery, ExpertCountsQuery),
}
CountExperts = Callable[[ExpertCountsQuery], Awaitable[ExpertCounts]]
FRAME_BYTES_MAX_OF = {
    Role.GATEWAY: FRAME_BYTES_MAX,
    Role.RANK: 4 << 20,  # the names of all blocks that a peer keeps here
    Role.CONTROL_PLANE: 4 << 20,  # a map
    Role.CLI: 4 << 10,
}


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
    `replication`, the rank refuses to keep KV replicas for its peers. `knows` says whether a member
    is registered or in the newest map: no other gets anything. `announced`, `unheard` and
    `left_out` are told in each Pong. For `orphan_s` seconds sessions go on after the connection of
    their gateway has broken. `offer_map` takes a map that a control plane hands over; it raises
    WireError if that is none. `on_control_plane_ping` and `on_control_plane_gone`, with the name:
    one has pinged; the last connection of one has ended."""

    def __init__(
        self,
        *,
        member: Member,
        access: Access,
        knows: Callable[[Member], bool],
        engine: EngineClient,
        endpoint: DataEndpoint,
        announced: Callable[[], tuple[AnnouncedOperation, ...]] = tuple,
        left_out: Callable[[], tuple[Member, ...]] = tuple,
        offer_map: Callable[[bytes], None] = lambda _: None,
        on_control_plane_ping: Callable[[str], None] = lambda _: None,
        on_control_plane_gone: Callable[[str], None] = lambda _: None,
        unheard: Callable[[], tuple[UnheardPeer, ...]] = tuple,
        replication: KvReplicaHost | None = None,
        orphan_s: float = 0.0,
        reports: AttemptReports | None = None,
        count_experts: CountExperts | None = None,
    ) -> None:
        self._member = member
        self._access = access
        self._knows = knows
        self._engine = engine
        self._endpoint = endpoint
        self._announced = announced
        self._left_out = left_out
        self._offer_map = offer_map
        self._on_control_plane_ping = on_control_plane_ping
        self._on_control_plane_gone = on_control_plane_gone
        self._unheard = unheard
        self._replication = replication
        self._orphan_s = orphan_s
        self._reports = reports
        self._count_experts = count_experts
        self._origins = itertools.count(1)
        self._writers: dict[Origin, asyncio.StreamWriter] = {}  # of those let in
        self._control_planes: dict[Origin, str] = {}  # their names, among these
        self._strangers: dict[Origin, asyncio.StreamWriter] = {}  # oldest first
        self._server: asyncio.Server | None = None
        self._closed = False
        self._refusal_logged_at = -REFUSALS_LOG_S
        self._num_refused = 0  # since then

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
        for writer in [*self._writers.values(), *self._strangers.values()]:
            writer.close()

    def send_tokens(self, tokens: StepTokens) -> None:
        """Sends the tokens of one committed step, one frame to each gateway."""
        for origin, sessions in tokens.sessions.items():
            writer = self._writers.get(origin)
            if writer is None:
                continue
            if self._reports is not None:
                self._reports.on_tokens(sessions)
            writer.write(self._tokens(sessions, tokens.epoch, tokens.step, tokens.load))
            if writer.transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
                log.error("gateway_too_slow", origin=origin)
                writer.transport.abort()

    def send_announcements(self) -> None:
        """Tells the control planes what is announced now."""
        if not self._control_planes:
            return
        pong = encode(self._pong(Ping(nonce=0)))
        for origin in self._control_planes:
            self._writers[origin].write(pong)

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
        try:
            caller = await self._admit(origin, reader, writer)
            if caller is not None:
                await self._serve_caller(origin, caller, reader, writer)
        except WireError as error:
            log.warning("bad_peer", origin=origin, detail=str(error))
        except ConnectionError:
            pass
        finally:
            self._forget_control_plane(origin)
            if self._writers.pop(origin, None) is not None:
                self._engine.orphan_origin(origin, self._orphan_s)
                if self._reports is not None:
                    self._reports.on_origin_gone(origin)
            writer.close()

    async def _admit(
        self, origin: Origin, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Caller | None:
        """None if it is refused. Raises ConnectionError."""
        self._strangers[origin] = writer
        if len(self._strangers) > STRANGERS_MAX:
            self._strangers.pop(next(iter(self._strangers))).transport.abort()
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                caller, welcome = await admit(self._member, self._access, reader, writer)
            self._strangers.pop(origin, None)
            if caller.member is not None:
                await self._wait_until_known(caller.member)
        except (WireError, TimeoutError) as error:
            self._log_refusal(str(error) or "no handshake in time")
            return None
        finally:
            self._strangers.pop(origin, None)
        self._writers[origin] = writer
        writer.write(encode(welcome))
        if caller.role is Role.CONTROL_PLANE:
            self._control_planes[origin] = caller.name
        return caller

    def _forget_control_plane(self, origin: Origin) -> None:
        name = self._control_planes.pop(origin, None)
        if name is not None and name not in self._control_planes.values() and not self._closed:
            self._on_control_plane_gone(name)

    def _log_refusal(self, detail: str) -> None:
        self._num_refused += 1
        now = asyncio.get_running_loop().time()
        if now - self._refusal_logged_at >= REFUSALS_LOG_S:
            log.warning("refused_connection", detail=detail, connections=self._num_refused)
            self._refusal_logged_at, self._num_refused = now, 0

    async def _wait_until_known(self, peer: Member) -> None:
        """Raises WireError if the peer is not registered."""
        try:
            async with asyncio.timeout(KNOWN_WITHIN_S):
                while not self._knows(peer):  # noqa: ASYNC110
                    await asyncio.sleep(KNOWN_POLL_S)
        except TimeoutError:
            raise WireError(f"rank {peer} is not registered") from None

    async def _serve_caller(
        self,
        origin: Origin,
        caller: Caller,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Until the connection ends. Raises WireError, ConnectionError."""
        bytes_max = FRAME_BYTES_MAX_OF[caller.role]
        while (message := await read_message(reader, bytes_max=bytes_max)) is not None:
            require_allowed(caller, message)
            if isinstance(message, OpenKvReplicaRegion | KvReplicasStored | DropKvReplicas):
                reply = await self._answer_on_kv_replicas(message)
            elif isinstance(message, ExpertCountsQuery) and self._count_experts is not None:
                reply = await self._count_experts(message)
            else:
                reply = self._answer(origin, message)
            if reply is not None:
                writer.write(encode(reply))
                await writer.drain()
            elif isinstance(message, Submit):
                # Hundreds may have come at once: what else waits has its turn between them.
                await asyncio.sleep(0)

    def _answer(self, origin: Origin, message: Message) -> Message | None:
        match message:
            case Submit():
                if not self._engine.submit(origin, message):
                    return self._refusal(message)
                if self._reports is not None:
                    self._reports.on_submit(origin, message)
            case Cancel():
                if not self._engine.cancel(message):
                    raise WireError("more cancellations than the engine can take")
                if self._reports is not None:
                    self._reports.on_cancel(message)
            case Wake():
                self._engine.wake(message)
            case GraphBarrierUpdate():
                self._engine.on_graph_update(message)
            case Ping():
                if message.tenants is not None:
                    self._engine.on_tenants(origin, message.tenants)
                if (name := self._control_planes.get(origin)) is not None:
                    self._on_control_plane_ping(name)
                return self._pong(message)
            case OpenRegion():
                return self._open_region(message)
            case OfferMap():
                self._offer_map(message.expert_map)
            case StatusQuery():
                return replace(
                    self._engine.status(message), memory_links=self._endpoint.memory_links
                )
            case _:
                raise WireError(f"{type(message).__name__} is not for a rank")
        return None

    def _pong(self, ping: Ping) -> Pong:
        return self._engine.pong(ping, self._announced(), self._unheard(), self._left_out())

    def _open_region(self, request: OpenRegion) -> RegionOpened:
        try:
            region = self._endpoint.open_region(request.source, request.generation)
        except (ValueError, MemoryError) as error:
            raise WireError(str(error)) from error
        return RegionOpened(
            target=self._member,
            source=request.source,
            generation=request.generation,
            transfer_name=self._endpoint.name,
            address=region.address,
            nbytes=region.nbytes,
            memory=region.memory,
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
        log.info("attempt_refused", request_id=submit.request_id, session=submit.session)
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


def require_allowed(caller: Caller, message: Message) -> None:
    """Raises WireError if this caller may not send this message."""
    if not isinstance(message, MAY_SEND[caller.role]):
        raise WireError(f"a {caller.role.value} must not send {type(message).__name__}")
    match message:
        case Submit(session=session) | Cancel(session=session):
            _require_own_session(caller, session)
        case Ping(tenants=tenants) if tenants is not None and caller.role is not Role.GATEWAY:
            raise WireError(f"a {caller.role.value} has no tenants")
        case Wake(rank=rank, incarnation=incarnation):
            _require_own_member(caller, Member(rank=rank, incarnation=incarnation))
        case GraphBarrierUpdate(member=member):
            _require_own_member(caller, member)
            counts = (message.limit, message.sleep_at, message.slept_at, message.launched)
            if not all(-1 <= count <= COUNT_MAX for count in counts):
                raise WireError(f"rank {member} cannot have launched so many graphs")
        case KvReplicasStored(source=source):
            _require_own_member(caller, source)
        case (
            OpenRegion(source=source, generation=generation)
            | OpenKvReplicaRegion(source=source, generation=generation)
            | DropKvReplicas(source=source, generation=generation)
        ):
            _require_own_member(caller, source)
            if not 0 <= generation <= GENERATION_MAX:
                raise WireError(f"rank {source} has no generation {generation}")


def _require_own_session(caller: Caller, session: SessionId) -> None:
    """A gateway's sessions begin with its name, so no other gateway can cancel or move them."""
    if session.rpartition("/")[0] != caller.name:
        raise WireError(f"the session {session[:128]!r} is not of {caller.name}")


def _require_own_member(caller: Caller, member: Member) -> None:
    if member != caller.member:
        raise WireError(f"{caller.name} sends a message of rank {member}")
