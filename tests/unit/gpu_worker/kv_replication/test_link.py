"""What a channel's link says to the target, in which order, and what it takes for an answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from gpu_worker.engine.kv_replication import Bytes
from gpu_worker.kv_replication.channel import Channel, Doorbells, RemoteSlots, Send
from gpu_worker.kv_replication.link import TOLD_AT_ONCE, CopyLink
from gpu_worker.kv_replication.staging_buffer import Rooms
from shared.types import Epoch, Incarnation, Member, RankId, Step
from shared.wire import (
    CopiesDropped,
    CopiesKept,
    DropCopies,
    Load,
    Message,
    Ping,
    Pong,
    encode,
    read_message,
)
from tests.unit.gpu_worker.kv_replication.scripted_engine import ScriptedEngine

SOURCE = Member(rank=RankId(0), incarnation=Incarnation(1))
TARGET = Member(rank=RankId(1), incarnation=Incarnation(4))
GENERATION = 3
LOAD = Load(running=0, waiting=0, tokens=0, kv_blocks_free=1, kv_blocks=1)


def new_room() -> Bytes:
    return np.zeros(8, dtype=np.uint8)


def kept(*slots: int) -> CopiesKept:
    names = tuple(b"%d" % slot for slot in slots)
    return CopiesKept(source=SOURCE, generation=GENERATION, slots=slots, names=names)


def pong(nonce: int) -> Pong:
    return Pong(
        nonce=nonce,
        rank=TARGET.rank,
        incarnation=TARGET.incarnation,
        epoch=Epoch(1),
        step=Step(0),
        engine_age_ms=0.0,
        waiting_for=(),
        load=LOAD,
    )


@dataclass
class World:
    """The target's end is the test's."""

    channel: Channel
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    held: asyncio.Task[str]

    def write(self, *slots: int) -> None:
        """As the sender does, when blocks have been written."""
        self.channel.wrote([Send(new_room(), slot, b"%d" % slot, lambda: True) for slot in slots])

    async def hear(self) -> Message | None:
        return await read_message(self.reader)

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.writer.write(encode(message))


@contextlib.asynccontextmanager
async def linked(pace_s: float = 0.0, pong_timeout_s: float = 1e6) -> AsyncIterator[World]:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    their_reader, their_writer = await asyncio.open_connection(sock=theirs)
    link = CopyLink(SOURCE, writer, pace_s=lambda: pace_s, pong_timeout_s=pong_timeout_s)
    remote = RemoteSlots(
        target=TARGET,
        is_elsewhere=True,
        generation=GENERATION,
        transfer_name="t",
        address=1 << 32,
        num_slots=100,
        block_bytes=8,
    )
    bells = Doorbells(sender=lambda channel: None, link=link.ring)
    channel = Channel(remote, Rooms(new_room, ScriptedEngine()), bells)
    held = asyncio.create_task(link.hold(channel, reader))
    try:
        yield World(channel, their_reader, their_writer, held)
    finally:
        held.cancel()
        await asyncio.wait([held])
        for each in (writer, their_writer):
            each.close()
            with contextlib.suppress(ConnectionError):
                await each.wait_closed()


async def answered(world: World, *messages: Message) -> None:
    """Says them, and waits until the link has heard them all."""
    world.say(*messages)
    world.channel.drop([99])
    while not isinstance(await world.hear(), DropCopies):
        pass


async def test_a_block_counts_as_sent_when_the_target_has_answered_what_came_after_it() -> None:
    async with linked() as world:
        world.write(4, 5)
        assert await world.hear() == kept(4, 5)
        assert await world.hear() == Ping(nonce=1)
        assert world.channel.take_sent() == []
        await answered(world, pong(1))
        assert world.channel.take_sent() == [b"4", b"5"]
        assert world.channel.take_sent() == []


async def test_what_is_told_while_an_answer_is_out_waits_for_the_next_one() -> None:
    async with linked() as world:
        world.write(1)
        assert [await world.hear(), await world.hear()] == [kept(1), Ping(nonce=1)]
        world.write(2)
        assert await world.hear() == kept(2)
        world.say(pong(1))
        assert await world.hear() == Ping(nonce=2)
        assert world.channel.take_sent() == [b"1"]
        await answered(world, pong(2))
        assert world.channel.take_sent() == [b"2"]


async def test_what_comes_soon_after_something_was_told_is_told_together() -> None:
    async with linked(pace_s=0.02) as world:
        world.write(1)
        assert [await world.hear(), await world.hear()] == [kept(1), Ping(nonce=1)]
        world.write(2)
        world.channel.drop([9])
        world.write(3)
        assert await world.hear() == kept(2, 3)
        assert await world.hear() == DropCopies(source=SOURCE, generation=GENERATION, slots=(9,))
        world.write(4)
        world.say(pong(1))
        assert await world.hear() == Ping(nonce=2)
        assert await world.hear() == kept(4)


async def test_many_news_are_told_at_once() -> None:
    async with linked(pace_s=1e6) as world:
        world.write(0)
        assert [await world.hear(), await world.hear()] == [kept(0), Ping(nonce=1)]
        few, rest = range(1, TOLD_AT_ONCE // 2), range(TOLD_AT_ONCE // 2, TOLD_AT_ONCE + 1)
        world.write(*few)
        await asyncio.sleep(0)
        world.write(*rest)
        assert await world.hear() == kept(*few, *rest)


async def test_a_failure_is_not_held_back_by_the_pace() -> None:
    async with linked(pace_s=1e6) as world:
        world.write(1)
        assert [await world.hear(), await world.hear()] == [kept(1), Ping(nonce=1)]
        world.channel.fail("a write timed out")
        assert await world.held == "a write timed out"


async def test_a_slot_may_be_written_anew_when_the_target_says_that_it_is_dropped() -> None:
    async with linked() as world:
        world.channel.drop([7, 8])
        drop = DropCopies(source=SOURCE, generation=GENERATION, slots=(7, 8))
        assert await world.hear() == drop
        assert await world.hear() == Ping(nonce=1)
        assert world.channel.take_dropped() == []
        answer = CopiesDropped(source=SOURCE, generation=GENERATION, slots=(7, 8))
        await answered(world, answer)
        assert world.channel.take_dropped() == [7, 8]


async def test_a_slot_is_made_known_before_it_is_dropped() -> None:
    async with linked() as world:
        world.channel.drop([1])
        world.write(2)
        assert await world.hear() == kept(2)
        assert isinstance(await world.hear(), DropCopies)


async def test_what_came_from_other_threads_before_the_link_was_held_is_told() -> None:
    async with linked() as world:
        thread = threading.Thread(target=world.write, args=(3,))
        thread.start()
        thread.join()
        assert await world.hear() == kept(3)


async def test_answers_to_another_generation_or_to_nothing_end_the_link() -> None:
    wrong = CopiesDropped(source=SOURCE, generation=GENERATION - 1, slots=(7,))
    for answer in (wrong, pong(1), kept(1)):
        async with linked() as world:
            world.say(answer)
            assert "not asked for" in await world.held
            assert not world.channel.is_open
            assert world.channel.take_dropped() == []


async def test_the_channel_closes_with_its_connection() -> None:
    async with linked() as world:
        world.write(1)
        await world.hear()
        world.writer.close()
        await world.held
        assert not world.channel.is_open
        assert world.channel.take_sent() == []


async def test_the_connection_ends_with_its_channel() -> None:
    async with linked() as world:
        world.channel.fail("a write timed out")
        assert await world.held == "a write timed out"
        assert await world.hear() is None


async def test_a_target_that_does_not_answer_is_given_up() -> None:
    async with linked(pong_timeout_s=0.0) as world:
        world.write(1)
        assert await world.held == "it does not answer"


async def test_a_link_that_is_not_wanted_any_more_closes_its_channel() -> None:
    async with linked() as world:
        world.write(1)
        await world.hear()
        world.held.cancel()
        await asyncio.wait([world.held])
        assert not world.channel.is_open
