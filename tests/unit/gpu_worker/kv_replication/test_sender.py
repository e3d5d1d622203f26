"""From a staging_buffer to a slot: when a block is written, when its staging_buffer may be used
again, and what a write that does not succeed does to its channel and to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from gpu_worker.engine.kv_replication import Bytes
from gpu_worker.kv_replication.block_tags import BlockTags
from gpu_worker.kv_replication.channel import (
    CHANNEL_STAGING_BUFFERS_MAX,
    Channel,
    RemoteSlots,
)
from gpu_worker.kv_replication.sender import WRITE_TIMEOUT_S, WRITES_MAX, Sender
from gpu_worker.kv_replication.staging_buffer import (
    LOST_STAGING_BUFFERS_MAX,
    NUM_STAGING_BUFFERS,
    StagingBuffers,
)
from shared.handshake import Access
from shared.types import Incarnation, Member, RankId
from tests.support.fake_clock import FakeClock
from tests.support.scripted_engine import ScriptedEngine

BLOCK_BYTES = 256
NUM_SLOTS = 1000


def saved() -> bool:
    return True


@dataclass
class Save:
    done: bool = False

    def is_done(self) -> bool:
        return self.done


class StagingBufferAllocator:
    """Keeps what it makes, as `engine.kv_replication.BlockCache` must."""

    def __init__(self) -> None:
        self.refuses = False
        self._made: list[Bytes] = []

    def new(self) -> Bytes:
        if self.refuses:
            raise OSError("no memory")
        self._made.append(np.zeros(BLOCK_BYTES, dtype=np.uint8))
        return self._made[-1]


@dataclass
class SenderHarness:
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    clock: FakeClock = field(default_factory=FakeClock)
    maker: StagingBufferAllocator = field(default_factory=StagingBufferAllocator)

    def __post_init__(self) -> None:
        self.staging_buffers = StagingBuffers(self.maker.new, self.engine)
        self.sender = Sender(self.engine, self.clock, BlockTags(Access("toy")))

    def channel(self, rank: int = 1) -> Channel:
        remote = RemoteSlots(
            target=Member(rank=RankId(rank), incarnation=Incarnation(1)),
            is_on_other_node=False,
            generation=1,
            transfer_name=f"rank-{rank}",
            address=rank << 32,
            num_slots=NUM_SLOTS,
            block_bytes=BLOCK_BYTES,
        )
        return Channel(
            remote,
            self.staging_buffers,
            notify_sender=self.sender.notify,
            notify_link=lambda: None,
        )

    def targets(self) -> list[int]:
        """Slots of rank 1 that were written to, in order."""
        return [(w.target - (1 << 32)) // BLOCK_BYTES for w in self.engine.writes.values()]


@pytest.fixture
def harness() -> SenderHarness:
    return SenderHarness()


def send(channel: Channel, slot: int, is_saved: Callable[[], bool] = saved) -> Bytes:
    staging_buffer = channel.take_staging_buffer()
    assert staging_buffer is not None
    channel.send(staging_buffer, slot, b"%d" % slot, is_saved)
    return staging_buffer


def staging_buffers_of(channel: Channel) -> Iterator[Bytes]:
    """All that it gets."""
    while (staging_buffer := channel.take_staging_buffer()) is not None:
        yield staging_buffer


def addresses(staging_buffers: Iterator[Bytes]) -> set[int]:
    return {int(staging_buffer.ctypes.data) for staging_buffer in staging_buffers}


def test_a_block_is_written_to_its_slot_and_named_once_that_has_completed(
    harness: SenderHarness,
) -> None:
    channel = harness.channel()
    staging_buffer = send(channel, 5)
    assert harness.sender.poll()
    (write,) = harness.engine.writes.values()
    assert write == (staging_buffer.ctypes.data, (1 << 32) + 5 * BLOCK_BYTES, BLOCK_BYTES)
    harness.sender.poll()
    assert channel.take_written() == []
    harness.engine.end(1)
    assert not harness.sender.poll()
    assert [block[:2] for block in channel.take_written()] == [(5, b"5")]
    assert channel.take_written() == []
    assert channel.is_open


def test_nothing_is_written_before_it_is_saved_nor_before_what_was_queued_earlier(
    harness: SenderHarness,
) -> None:
    channel, save = harness.channel(), Save()
    send(channel, 0, save.is_done)
    send(channel, 1)
    assert harness.sender.poll()
    assert harness.targets() == []
    save.done = True
    harness.sender.poll()
    assert harness.targets() == [0, 1]


def test_few_writes_are_under_way_at_once_and_the_next_follow_as_they_end(
    harness: SenderHarness,
) -> None:
    channel = harness.channel()
    for slot in range(WRITES_MAX + 2):
        send(channel, slot)
    harness.sender.poll()
    assert len(harness.engine.under_way) == WRITES_MAX
    harness.engine.end(2)
    harness.sender.poll()
    assert harness.targets() == list(range(WRITES_MAX + 1))
    assert [block[:2] for block in channel.take_written()] == [(1, b"1")]


def test_a_room_is_not_handed_out_again_while_its_write_reads_it(harness: SenderHarness) -> None:
    channel, other = harness.channel(), harness.channel(2)
    sent = send(channel, 0)
    harness.sender.poll()
    assert sent.ctypes.data not in addresses(staging_buffers_of(channel)) | addresses(
        staging_buffers_of(other)
    )


def test_all_staging_buffers_come_back(harness: SenderHarness) -> None:
    channel = harness.channel()
    for slot in range(3 * NUM_STAGING_BUFFERS):
        send(channel, slot)
        harness.sender.poll()
        harness.engine.end(slot + 1)
        harness.sender.poll()
    assert len(list(staging_buffers_of(channel))) == CHANNEL_STAGING_BUFFERS_MAX


def test_a_channel_whose_target_hangs_leaves_staging_buffers_and_time_to_the_others(
    harness: SenderHarness,
) -> None:
    hung, healthy = harness.channel(1), harness.channel(2)
    for slot, staging_buffer in enumerate(list(staging_buffers_of(hung))):
        hung.send(staging_buffer, slot, b"", saved)
    harness.sender.poll()
    before = set(harness.engine.writes)
    for slot in range(5):
        send(healthy, slot)
    while not harness.sender.poll() or harness.engine.under_way - before:
        for batch in harness.engine.under_way - before:
            harness.engine.end(batch)
    assert len(healthy.take_written()) == 5
    assert hung.take_staging_buffer() is None
    assert hung.is_open


def test_a_failed_write_closes_the_channel_and_all_its_staging_buffers_come_back(
    harness: SenderHarness,
) -> None:
    channel, other = harness.channel(), harness.channel(2)
    for slot in range(CHANNEL_STAGING_BUFFERS_MAX):
        send(channel, slot)
    harness.sender.poll()
    harness.engine.end(1, -1)
    harness.sender.poll()
    assert not channel.is_open
    assert channel.take_staging_buffer() is None
    assert len(harness.engine.writes) == WRITES_MAX  # nothing more was begun
    for batch in list(harness.engine.under_way):
        harness.engine.end(batch, -1)
    assert not harness.sender.poll()
    assert channel.take_written() == []
    num_free = sum(len(list(staging_buffers_of(harness.channel(rank)))) for rank in range(3, 10))
    assert num_free == NUM_STAGING_BUFFERS
    assert other.is_open


def test_the_room_of_a_block_that_is_not_saved_yet_stays_out_though_the_channel_is_closed(
    harness: SenderHarness,
) -> None:
    channel, save = harness.channel(), Save()
    staging_buffer = send(channel, 0, save.is_done)
    channel.fail("the control connection ended")
    others = [harness.channel(rank) for rank in range(2, 7)]
    assert harness.sender.poll()
    assert staging_buffer.ctypes.data not in set.union(
        *(addresses(staging_buffers_of(c)) for c in others)
    )
    save.done = True
    assert not harness.sender.poll()
    assert addresses(staging_buffers_of(harness.channel(8))) == {staging_buffer.ctypes.data}
    assert harness.engine.writes == {}


def test_a_room_that_was_taken_before_the_channel_closed_comes_back_when_it_is_sent(
    harness: SenderHarness,
) -> None:
    channel = harness.channel()
    staging_buffer = channel.take_staging_buffer()
    assert staging_buffer is not None
    channel.fail("the control connection ended")
    harness.sender.poll()
    channel.send(staging_buffer, 0, b"a", saved)
    assert not harness.sender.poll()
    num_free = sum(len(list(staging_buffers_of(harness.channel(rank)))) for rank in range(2, 10))
    assert num_free == NUM_STAGING_BUFFERS


def test_a_write_that_cannot_start_closes_the_channel(harness: SenderHarness) -> None:
    channel = harness.channel()
    harness.engine.refuses = True
    send(channel, 0)
    assert not harness.sender.poll()
    assert not channel.is_open


def test_the_room_of_a_write_that_timed_out_is_never_used_again_but_replaced(
    harness: SenderHarness,
) -> None:
    channel = harness.channel()
    lost = send(channel, 0)
    harness.sender.poll()
    harness.engine.end(1, -2)
    assert not harness.sender.poll()
    assert not channel.is_open
    assert lost.ctypes.data in harness.engine.registered
    free = set.union(
        *(addresses(staging_buffers_of(harness.channel(rank))) for rank in range(2, 10))
    )
    assert len(free) == NUM_STAGING_BUFFERS
    assert lost.ctypes.data not in free


def lose(harness: SenderHarness, count: int) -> None:
    for _ in range(count):
        channel = harness.channel()
        send(channel, 0)
        harness.sender.poll()
        harness.engine.end(len(harness.engine.writes), -2)
        harness.sender.poll()


def test_after_too_many_lost_staging_buffers_nothing_is_sent_any_more(
    harness: SenderHarness,
) -> None:
    lose(harness, LOST_STAGING_BUFFERS_MAX)
    assert harness.channel().take_staging_buffer() is not None
    lose(harness, 1)
    assert harness.channel().take_staging_buffer() is None


def test_where_the_host_refuses_memory_for_another_room_nothing_is_raised(
    harness: SenderHarness,
) -> None:
    lose(harness, 1)
    harness.maker.refuses = True
    taken = [list(staging_buffers_of(harness.channel(rank))) for rank in range(2, 10)]
    assert sum(map(len, taken)) == NUM_STAGING_BUFFERS - 1


def test_a_write_that_never_ends_closes_the_channel_and_keeps_its_staging_buffer(
    harness: SenderHarness,
) -> None:
    channel = harness.channel()
    staging_buffer = send(channel, 0)
    harness.sender.poll()
    harness.clock.advance(WRITE_TIMEOUT_S - 0.1)
    harness.sender.poll()
    assert channel.is_open
    harness.clock.advance(0.2)
    assert harness.sender.poll()
    assert not channel.is_open
    free = set.union(
        *(addresses(staging_buffers_of(harness.channel(rank))) for rank in range(2, 10))
    )
    assert staging_buffer.ctypes.data not in free
    harness.engine.end(1)
    assert not harness.sender.poll()
    assert addresses(staging_buffers_of(harness.channel(11))) == {staging_buffer.ctypes.data}


def test_a_write_that_has_ended_is_not_late_however_late_the_sender_looks(
    harness: SenderHarness,
) -> None:
    channel = harness.channel()
    send(channel, 0)
    harness.sender.poll()
    harness.engine.end(1)
    harness.clock.advance(10 * WRITE_TIMEOUT_S)
    harness.sender.poll()
    assert channel.is_open
    assert [block[:2] for block in channel.take_written()] == [(0, b"0")]


def test_a_closed_channel_keeps_its_first_reason(harness: SenderHarness) -> None:
    channel = harness.channel()
    channel.fail("one")
    channel.fail("two")
    assert channel.failure == "one"
