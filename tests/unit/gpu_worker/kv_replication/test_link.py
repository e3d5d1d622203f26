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
from gpu_worker.kv_replication.channel import Channel, RemoteSlots, StoredBlock
from gpu_worker.kv_replication.link import NOTIFY_AT_ONCE_MIN, ReplicaLink
from gpu_worker.kv_replication.staging_buffer import StagingBuffers
from shared.types import Epoch, Incarnation, Member, RankId, Step
from shared.wire import (
    DropKvReplicas,
    KvReplicasDropped,
    KvReplicasStored,
    Load,
    Message,
    Ping,
    Pong,
    encode,
    read_message,
)
from tests.support.scripted_engine import ScriptedEngine

SOURCE = Member(rank=RankId(0), incarnation=Incarnation(1))
TARGET = Member(rank=RankId(1), incarnation=Incarnation(4))
GENERATION = 3
LOAD = Load(running=0, waiting=0, tokens=0, kv_blocks_free=1, kv_blocks=1)


def new_staging_buffer() -> Bytes:
    return np.zeros(8, dtype=np.uint8)


def kept(*slots: int) -> KvReplicasStored:
    names = tuple(b"%d" % slot for slot in slots)
    tags = tuple(b"tag of %d" % slot for slot in slots)
    return KvReplicasStored(
        source=SOURCE, generation=GENERATION, slots=slots, names=names, tags=tags
    )


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
class LinkHarness:
    """The target's end is the test's."""

    channel: Channel
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    held: asyncio.Task[str]
    pace: list[float]
    """Its one element is how long the link waits between two messages, in seconds."""

    def write(self, *slots: int) -> None:
        """As the sender does, when blocks have been written."""
        self.channel.wrote([StoredBlock(slot, b"%d" % slot, b"tag of %d" % slot) for slot in slots])

    async def hear(self) -> Message | None:
        return await read_message(self.reader)

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.writer.write(encode(message))


@contextlib.asynccontextmanager
async def linked(pace_s: float = 0.0, pong_timeout_s: float = 1e6) -> AsyncIterator[LinkHarness]:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    their_reader, their_writer = await asyncio.open_connection(sock=theirs)
    pace = [pace_s]
    link = ReplicaLink(SOURCE, writer, pace_s=lambda: pace[0], pong_timeout_s=pong_timeout_s)
    remote = RemoteSlots(
        target=TARGET,
        is_on_other_node=True,
        generation=GENERATION,
        transfer_name="t",
        address=1 << 32,
        num_slots=100,
        block_bytes=8,
    )
    channel = Channel(
        remote,
        StagingBuffers(new_staging_buffer, ScriptedEngine()),
        notify_sender=lambda channel: None,
        notify_link=link.notify,
    )
    held = asyncio.create_task(link.hold(channel, reader))
    try:
        yield LinkHarness(channel, their_reader, their_writer, held, pace)
    finally:
        held.cancel()
        await asyncio.wait([held])
        for each in (writer, their_writer):
            each.close()
            with contextlib.suppress(ConnectionError):
                await each.wait_closed()


async def answered(harness: LinkHarness, *messages: Message) -> None:
    """Says them, and waits until the link has heard them all."""
    harness.say(*messages)
    harness.channel.drop([99])
    while not isinstance(await harness.hear(), DropKvReplicas):
        pass


async def test_a_block_counts_as_sent_when_the_target_has_answered_what_came_after_it() -> None:
    async with linked() as harness:
        harness.write(4, 5)
        assert await harness.hear() == kept(4, 5)
        assert await harness.hear() == Ping(nonce=1)
        assert harness.channel.take_sent() == []
        await answered(harness, pong(1))
        assert harness.channel.take_sent() == [b"4", b"5"]
        assert harness.channel.take_sent() == []


async def test_what_is_told_while_an_answer_is_out_waits_for_the_next_one() -> None:
    async with linked() as harness:
        harness.write(1)
        assert [await harness.hear(), await harness.hear()] == [kept(1), Ping(nonce=1)]
        harness.write(2)
        assert await harness.hear() == kept(2)
        harness.say(pong(1))
        assert await harness.hear() == Ping(nonce=2)
        assert harness.channel.take_sent() == [b"1"]
        await answered(harness, pong(2))
        assert harness.channel.take_sent() == [b"2"]


async def test_what_comes_soon_after_something_was_told_is_told_together() -> None:
    async with linked(pace_s=0.02) as harness:
        harness.write(1)
        assert [await harness.hear(), await harness.hear()] == [kept(1), Ping(nonce=1)]
        harness.write(2)
        harness.channel.drop([9])
        harness.write(3)
        assert await harness.hear() == kept(2, 3)
        assert await harness.hear() == DropKvReplicas(
            source=SOURCE, generation=GENERATION, slots=(9,)
        )
        harness.pace[0] = 1e6
        harness.write(4)
        harness.say(pong(1))
        assert await harness.hear() == Ping(nonce=2)
        harness.pace[0] = 0.0
        harness.write(5)
        assert await harness.hear() == kept(4, 5)


async def test_many_news_are_told_at_once() -> None:
    async with linked(pace_s=1e6) as harness:
        harness.write(0)
        assert [await harness.hear(), await harness.hear()] == [kept(0), Ping(nonce=1)]
        few, rest = (
            range(1, NOTIFY_AT_ONCE_MIN // 2),
            range(NOTIFY_AT_ONCE_MIN // 2, NOTIFY_AT_ONCE_MIN + 1),
        )
        harness.write(*few)
        await asyncio.sleep(0)
        harness.write(*rest)
        assert await harness.hear() == kept(*few, *rest)


async def test_a_failure_is_not_held_back_by_the_pace() -> None:
    async with linked(pace_s=1e6) as harness:
        harness.write(1)
        assert [await harness.hear(), await harness.hear()] == [kept(1), Ping(nonce=1)]
        harness.channel.fail("a write timed out")
        assert await harness.held == "a write timed out"


async def test_a_slot_may_be_written_anew_when_the_target_says_that_it_is_dropped() -> None:
    async with linked() as harness:
        harness.channel.drop([7, 8])
        drop = DropKvReplicas(source=SOURCE, generation=GENERATION, slots=(7, 8))
        assert await harness.hear() == drop
        assert await harness.hear() == Ping(nonce=1)
        assert harness.channel.take_dropped() == []
        answer = KvReplicasDropped(source=SOURCE, generation=GENERATION, slots=(7, 8))
        await answered(harness, answer)
        assert harness.channel.take_dropped() == [7, 8]


async def test_a_slot_is_made_known_before_it_is_dropped() -> None:
    async with linked() as harness:
        harness.channel.drop([1])
        harness.write(2)
        assert await harness.hear() == kept(2)
        assert isinstance(await harness.hear(), DropKvReplicas)


async def test_what_came_from_other_threads_before_the_link_was_held_is_sent() -> None:
    async with linked() as harness:
        thread = threading.Thread(target=harness.write, args=(3,))
        thread.start()
        thread.join()
        assert await harness.hear() == kept(3)


async def test_answers_to_another_generation_or_to_nothing_end_the_link() -> None:
    wrong = KvReplicasDropped(source=SOURCE, generation=GENERATION - 1, slots=(7,))
    for answer in (wrong, pong(1), kept(1)):
        async with linked() as harness:
            harness.say(answer)
            assert "not asked for" in await harness.held
            assert not harness.channel.is_open
            assert harness.channel.take_dropped() == []


async def test_the_channel_closes_with_its_connection() -> None:
    async with linked() as harness:
        harness.write(1)
        await harness.hear()
        harness.writer.close()
        await harness.held
        assert not harness.channel.is_open
        assert harness.channel.take_sent() == []


async def test_the_connection_ends_with_its_channel() -> None:
    async with linked() as harness:
        harness.channel.fail("a write timed out")
        assert await harness.held == "a write timed out"
        assert await harness.hear() is None


async def test_a_target_that_does_not_answer_is_given_up() -> None:
    async with linked(pong_timeout_s=0.0) as harness:
        harness.write(1)
        assert await harness.held == "it does not answer"


async def test_a_link_that_is_not_wanted_any_more_closes_its_channel() -> None:
    async with linked() as harness:
        harness.write(1)
        await harness.hear()
        harness.held.cancel()
        await asyncio.wait([harness.held])
        assert not harness.channel.is_open
