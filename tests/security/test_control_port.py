"""What a process that does not belong to the instance, or has another role in it, reaches at a
rank's control port: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import tracemalloc

import msgpack
import pytest

from control_plane.probe_events import ProbeEvent, ProbeRefused
from control_plane.prober import Prober
from gpu_worker.control_server import MAY_SEND, STRANGERS_MAX, require_allowed
from gpu_worker.engine.mailbox import DropOrigin
from shared.errors import AddressReused, WireError
from shared.handshake import (
    NAME_KEY_BYTES,
    Access,
    Caller,
    gateway_caller,
    introduce,
    rank_caller,
)
from shared.types import (
    Attempt,
    Epoch,
    Incarnation,
    Member,
    RankId,
    Role,
    SamplingParams,
    SessionId,
    Step,
)
from shared.wire import (
    Cancel,
    Challenge,
    DropKvReplicas,
    GraphBarrierUpdate,
    Hello,
    KvReplicasStored,
    Message,
    OpenKvReplicaRegion,
    OpenRegion,
    Ping,
    Pong,
    Proof,
    RegionOpened,
    StatusQuery,
    StatusReply,
    Submit,
    Wake,
    Welcome,
    decode,
    encode,
)
from tests.support.control_port import ACCESS, PEER, RANK, Connection, control_port, record_of

GATEWAY = gateway_caller("gateway-a", b"a" * NAME_KEY_BYTES)
OTHER_GATEWAY = gateway_caller("gateway-b", b"b" * NAME_KEY_BYTES)
CONTROL_PLANE = Caller(role=Role.CONTROL_PLANE, name="plane")
CLI = Caller(role=Role.CLI, name="cli")
INVENTED = Member(rank=RankId(99), incarnation=Incarnation(1))
STRANGER = Access(ACCESS.instance, b"another secret of 32 characters!!")


def hello(role: Role = Role.CLI, **changes: object) -> Hello:
    fields = {"name": "x", "instance": ACCESS.instance, "nonce": bytes(16), **changes}
    return Hello(role=role, **fields)  # type: ignore[arg-type]


def submit(session: str, attempt: int = 0) -> Submit:
    return Submit(
        session=SessionId(session),
        attempt=Attempt(attempt),
        tokens=(1,),
        num_emitted=0,
        sampling=SamplingParams(),
    )


def cancel(session: str) -> Cancel:
    return Cancel(session=SessionId(session), attempt=Attempt(0))


def update(member: Member = PEER, limit: int = 0) -> GraphBarrierUpdate:
    return GraphBarrierUpdate(
        member=member,
        joining=Epoch(0),
        limit=limit,
        paused=Epoch(0),
        entered=Epoch(0),
        sleep_at=-1,
        slept_at=-1,
        invalidated=Epoch(0),
        launched=0,
    )


def messages_of(member: Member, session: str) -> list[Message]:
    """One of each kind that any caller may send."""
    return [
        submit(session),
        cancel(session),
        Ping(nonce=1),
        StatusQuery(nonce=1),
        Wake(rank=member.rank, incarnation=member.incarnation, epoch=Epoch(1), step=Step(1)),
        update(member),
        OpenRegion(source=member, transfer_name="t", generation=1),
        OpenKvReplicaRegion(source=member, generation=1, layout="l", block_bytes=1),
        KvReplicasStored(source=member, generation=1, slots=(0,), names=(b"n",), tags=(b"",)),
        DropKvReplicas(source=member, generation=1, slots=(0,)),
    ]


# Strangers ---------------------------------------------------------------------------------------


async def test_a_stranger_is_not_let_in_and_is_told_nothing_but_who_listens() -> None:
    async with control_port() as port:
        with pytest.raises(WireError):
            await port.enter(CLI, STRANGER)
        connection = await port.connect()
        connection.send(hello())
        challenge = await connection.next()
        assert isinstance(challenge, Challenge)
        connection.send(StatusQuery(nonce=1), Ping(nonce=1))
        assert await connection.next() is None
        assert await (await port.enter(CLI)).is_served()


async def test_no_message_counts_before_the_handshake() -> None:
    async with control_port() as port:
        for message in messages_of(PEER, f"{GATEWAY.name}/1"):
            connection = await port.connect()
            connection.send(message)
            assert await connection.next() is None
        assert port.endpoint.given == []


async def test_a_proof_that_was_overheard_is_worth_nothing_later() -> None:
    async with control_port() as port:
        overheard: list[Message] = []
        first = await port.connect()

        class Tap:
            def write(self, data: bytes) -> None:
                overheard.append(decode(data[4:]))
                first.writer.write(data)

        await introduce(CLI, port.record, ACCESS, first.reader, Tap())  # type: ignore[arg-type]
        assert [type(m) for m in overheard] == [Hello, Proof]
        second = await port.connect()
        second.send(*overheard)
        assert isinstance(await second.next(), Challenge)
        assert await second.next() is None


async def test_a_rank_that_does_not_know_the_secret_is_not_believed() -> None:
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = {"instance": ACCESS.instance, "rank": RANK.rank, "incarnation": RANK.incarnation}
        writer.write(encode(Challenge(**rank, nonce=bytes(16))))  # type: ignore[arg-type]
        writer.write(encode(Welcome(**rank, proof=bytes(32))))  # type: ignore[arg-type]
        await reader.read()
        writer.close()

    async with control_port() as port:
        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        port.port = server.sockets[0].getsockname()[1]
        with pytest.raises(WireError, match="secret"):
            await port.enter(GATEWAY)
        await port.close()
        server.close()


async def test_two_instances_behind_one_address_do_not_mix() -> None:
    """The same secret, or none, does not help: the name is part of the proof."""
    for secret in (ACCESS.secret, b""):
        other = Access("green", secret)
        async with control_port(access=other) as port:
            with pytest.raises(AddressReused, match="green"):
                await port.enter(GATEWAY, Access("blue", secret))
            connection = await port.connect()
            connection.send(hello(instance="blue"))
            assert isinstance(await connection.next(), Challenge)
            connection.send(Proof(proof=bytes(32)))
            assert await connection.next() is None


async def test_a_probe_that_another_instance_answers_counts_as_refused() -> None:
    events: asyncio.Queue[ProbeEvent] = asyncio.Queue()
    async with control_port(access=Access("green", ACCESS.secret)) as port:
        prober = Prober(
            name="p", access=ACCESS, report=events.put, interval_s=0.1, urgent_interval_s=0.1
        )
        prober.watch([record_of(RANK, port.port)])
        running = asyncio.ensure_future(prober.run())
        async with asyncio.timeout(5):
            assert await events.get() == ProbeRefused(member=RANK)
        running.cancel()
        await asyncio.wait([running])


# Roles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", [GATEWAY, rank_caller(PEER), CONTROL_PLANE, CLI])
def test_each_role_may_send_its_own_messages_alone(caller: Caller) -> None:
    sent = messages_of(PEER, f"{GATEWAY.name}/1")
    allowed = []
    for message in sent:
        try:
            require_allowed(caller, message)
        except WireError:
            continue
        allowed.append(type(message))
    assert allowed == [type(m) for m in sent if isinstance(m, MAY_SEND[caller.role])]
    assert len(allowed) < len(sent)


async def test_a_status_query_changes_nothing_and_anything_else_ends_the_connection() -> None:
    async with control_port() as port:
        connection = await port.enter(CLI)
        connection.send(StatusQuery(nonce=5))
        assert isinstance(await connection.next(), StatusReply)
        connection.send(submit(f"{GATEWAY.name}/1"))
        assert await connection.next() is None


# Sessions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "theft",
    [
        cancel(f"{GATEWAY.name}/1"),
        submit(f"{GATEWAY.name}/1", attempt=9),
        submit("no-gateway"),
        submit(f"{GATEWAY.name}/1/{OTHER_GATEWAY.name}/1"),
    ],
)
async def test_a_gateway_can_neither_end_nor_move_the_session_of_another(theft: Message) -> None:
    async with control_port() as port:
        connection = await port.enter(OTHER_GATEWAY)
        connection.send(theft)
        assert await connection.next() is None
        owner = await port.enter(GATEWAY)
        owner.send(submit(f"{GATEWAY.name}/1"), cancel(f"{GATEWAY.name}/1"))
        assert await owner.is_served()


async def test_no_process_takes_the_name_of_another_gateway() -> None:
    async with control_port() as port:
        for key in (b"", b"b" * NAME_KEY_BYTES):
            with pytest.raises(WireError):
                await port.enter(Caller(role=Role.GATEWAY, name=GATEWAY.name, name_key=key))


# Members -----------------------------------------------------------------------------------------


async def test_invented_members_get_no_memory() -> None:
    async with control_port() as port:
        with pytest.raises(WireError):
            await port.enter_as_peer(INVENTED)
        for request in messages_of(INVENTED, "-"):
            if not isinstance(request, MAY_SEND[Role.RANK]) or isinstance(request, Ping):
                continue
            connection = await port.enter_as_peer()
            connection.send(request)
            assert await connection.next() is None
        assert port.endpoint.given == []


async def test_a_peer_whose_record_is_still_on_its_way_is_let_in() -> None:
    late = Member(rank=RankId(2), incarnation=Incarnation(4))
    async with control_port() as port:
        asyncio.get_running_loop().call_later(0.1, port.known.add, late)
        connection = await port.enter_as_peer(late)
        connection.send(OpenRegion(source=late, transfer_name="t", generation=1))
        assert isinstance(await connection.next(), RegionOpened)


@pytest.mark.parametrize(
    "forged",
    [
        OpenRegion(source=PEER, transfer_name="t", generation=1 << 62),
        OpenRegion(source=PEER, transfer_name="t", generation=-1),
        OpenKvReplicaRegion(source=PEER, generation=1 << 62, layout="l", block_bytes=1),
        update(limit=1 << 62),
    ],
)
async def test_impossible_numbers_end_the_connection(forged: Message) -> None:
    async with control_port() as port:
        connection = await port.enter_as_peer()
        connection.send(forged)
        assert await connection.next() is None
        assert port.endpoint.given == []


# Sizes, times and numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("caller", [rank_caller(PEER), Caller(role=Role.CLI, name="x")])
async def test_only_gateways_tell_whose_sessions_are_in_flight(caller: Caller) -> None:
    """Who could invent a client would take steps from the others."""
    with pytest.raises(WireError, match="has no tenants"):
        require_allowed(caller, Ping(nonce=1, tenants=("invented",)))
    require_allowed(caller, Ping(nonce=1))


async def test_a_gateway_that_is_gone_has_no_client_in_flight() -> None:
    async with control_port() as port:
        connection = await port.enter(GATEWAY)
        connection.send(Ping(nonce=1, tenants=("a", "b")))
        assert isinstance(await connection.next(), Pong)
        assert port.tenants == {"a", "b"}
        connection.writer.transport.abort()
        async with asyncio.timeout(10):
            while port.tenants:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_connections_that_come_and_go_leave_nothing_with_an_engine_that_reads_nothing() -> (
    None
):
    """An engine may wait for a peer for long."""

    def num_waiting() -> int:
        gc.collect()
        return sum(type(each) is DropOrigin for each in gc.get_objects())

    before = num_waiting()
    async with control_port() as port:
        for caller in (GATEWAY, CLI, CONTROL_PLANE, rank_caller(PEER)) * 10:
            connection = await port.enter(caller)
            assert await connection.is_served()
            connection.writer.close()
        connection = await port.enter(GATEWAY)
        connection.send(submit(f"{GATEWAY.name}/1"))
        assert await connection.is_served()
        connection.writer.close()
        async with asyncio.timeout(10):
            while num_waiting() == before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert num_waiting() == before + 1, "of the connection that has sent a session"


async def test_a_stranger_sends_small_frames_or_none() -> None:
    async with control_port() as port:
        connection = await port.connect()
        connection.writer.write((1 << 20).to_bytes(4, "big") + bytes(100))
        assert await connection.next() is None


async def test_connections_that_wait_outside_keep_nobody_out() -> None:
    async with control_port() as port:
        waiting: list[Connection] = []
        for _ in range(STRANGERS_MAX + 40):
            connection = await port.connect()
            connection.writer.write(b"\0\0")
            waiting.append(connection)
        began = time.monotonic()
        assert await (await port.enter(GATEWAY)).is_served()
        assert time.monotonic() - began < 1.0
        async with asyncio.timeout(2.0):  # well before their handshakes have taken too long
            ends = [await c.reader.read() for c in waiting[:41]]
        assert ends == [b""] * 41, "the oldest go first"


async def test_a_handshake_that_does_not_go_on_is_ended() -> None:
    async with control_port() as port:
        connection = await port.connect()
        connection.send(hello())
        assert isinstance(await connection.next(), Challenge)
        assert await connection.next() is None  # within the 10 s that `next` waits


def test_a_legal_frame_of_empty_lists_costs_neither_memory_nor_time() -> None:
    """16 MiB of them took 700 MB, and stopped the loop for seconds."""
    fields = {"session": "s", "attempt": 0, "tokens": [], "num_emitted": 0, "sampling": {}}
    bodies = [
        b"\xdd" + (4 << 20).to_bytes(4, "big") + b"\x90" * (4 << 20),  # not even a pair
        b"\x92\xa4Ping\xdd" + (4 << 20).to_bytes(4, "big") + b"\x90" * (4 << 20),
        msgpack.packb(["Submit", {**fields, "tokens": [[]] * (4 << 20)}]),
        msgpack.packb(["Ping", {"nonce": 1, "more": [[]] * (4 << 20)}]),
        b"\x92\xa4Ping" + b"\x91" * (1 << 20) + b"\x90",  # deep
    ]
    tracemalloc.start()
    try:
        for body in bodies:
            began = time.monotonic()
            with contextlib.suppress(WireError):
                decode(body)
            assert time.monotonic() - began < 0.5
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
