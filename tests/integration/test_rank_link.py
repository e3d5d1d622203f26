"""A gateway's link to a rank on the loop that gateways run on: it raises where one writes to a
closed transport."""

from __future__ import annotations

import asyncio
import itertools

import uvloop

from gateway.rank_link import LinkEvents, RankLink
from shared.clock import SystemClock
from shared.handshake import NAME_KEY_BYTES, Access, admit, gateway_caller
from shared.records import RankRecord
from shared.types import Attempt, Incarnation, Member, NodeId, RankId, RankState, SessionId
from shared.wire import Cancel, encode

RANK = Member(rank=RankId(0), incarnation=Incarnation(1))
CANCEL = Cancel(session=SessionId("s"), attempt=Attempt(1))
ACCESS = Access("default")
TURNS = 50  # of the loop: more than a reader takes to see that its connection is closed


def test_what_is_sent_into_a_connection_that_just_ended_is_lost_and_harms_nobody() -> None:
    uvloop.run(_send_around_the_end())


async def _send_around_the_end() -> None:
    accepted: list[asyncio.StreamWriter] = []
    opened, broken = asyncio.Event(), asyncio.Event()

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, welcome = await admit(RANK, ACCESS, reader, writer)
        writer.write(encode(welcome))
        accepted.append(writer)

    server = await asyncio.start_server(welcome, "127.0.0.1", 0)
    link = RankLink(
        record=_record(server.sockets[0].getsockname()[1]),
        caller=gateway_caller("g", bytes(NAME_KEY_BYTES)),
        access=ACCESS,
        events=LinkEvents(
            opened=lambda record: opened.set(),
            tokens=lambda member, tokens: None,
            pong=lambda member, pong: None,
            broken=lambda member, reason, detail: broken.set(),
        ),
        clock=SystemClock(),
    )
    running = asyncio.ensure_future(link.run())
    try:
        await opened.wait()
        assert link.send(CANCEL)
        accepted[0].transport.abort()
        turns = itertools.count()
        while not broken.is_set() or next(turns) < TURNS:
            link.send(CANCEL)
            link.probe(0.0)
            assert not running.done()
            await asyncio.sleep(0)
    finally:
        running.cancel()
        await asyncio.wait([running])
        server.close()
        for writer in accepted:
            writer.transport.abort()
        for _ in range(TURNS):
            await asyncio.sleep(0)


def _record(port: int) -> RankRecord:
    return RankRecord(
        rank=RANK.rank,
        incarnation=RANK.incarnation,
        node=NodeId("n"),
        pid=1,
        lease_id=1,
        state=RankState.READY,
        control_host="127.0.0.1",
        control_port=port,
        transfer_name="t",
        slots=1,
        kv_blocks=1,
        kv_block_tokens=1,
        exchange="local",
    )
