"""From a room to a slot: when a block is written, when its room may be used again, and what a write
that does not succeed does to its channel and to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from gpu_worker.engine.kv_replication import Bytes
from gpu_worker.kv_replication.channel import CHANNEL_ROOMS_MAX, Channel, Doorbells, RemoteSlots
from gpu_worker.kv_replication.sender import WRITE_TIMEOUT_S, WRITES_MAX, Sender
from gpu_worker.kv_replication.staging_buffer import LOST_ROOMS_MAX, NUM_ROOMS, Rooms
from shared.types import Incarnation, Member, RankId
from tests.support.fake_clock import FakeClock
from tests.unit.gpu_worker.kv_replication.scripted_engine import ScriptedEngine

BLOCK_BYTES = 256
NUM_SLOTS = 1000


def saved() -> bool:
    return True


@dataclass
class Save:
    done: bool = False

    def is_done(self) -> bool:
        return self.done


class RoomMaker:
    """Keeps what it makes, as `ports.BlockCache` must."""

    def __init__(self) -> None:
        self.refuses = False
        self._made: list[Bytes] = []

    def new(self) -> Bytes:
        if self.refuses:
            raise OSError("no memory")
        self._made.append(np.zeros(BLOCK_BYTES, dtype=np.uint8))
        return self._made[-1]


@dataclass
class World:
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    clock: FakeClock = field(default_factory=FakeClock)
    maker: RoomMaker = field(default_factory=RoomMaker)

    def __post_init__(self) -> None:
        self.rooms = Rooms(self.maker.new, self.engine)
        self.sender = Sender(self.engine, self.clock)

    def channel(self, rank: int = 1) -> Channel:
        remote = RemoteSlots(
            target=Member(rank=RankId(rank), incarnation=Incarnation(1)),
            is_elsewhere=False,
            generation=1,
            transfer_name=f"rank-{rank}",
            address=rank << 32,
            num_slots=NUM_SLOTS,
            block_bytes=BLOCK_BYTES,
        )
        return Channel(remote, self.rooms, Doorbells(sender=self.sender.ring, link=lambda: None))

    def targets(self) -> list[int]:
        """Slots of rank 1 that were written to, in order."""
        return [(w.target - (1 << 32)) // BLOCK_BYTES for w in self.engine.writes.values()]


@pytest.fixture
def world() -> World:
    return World()


def send(channel: Channel, slot: int, is_saved: Callable[[], bool] = saved) -> Bytes:
    room = channel.take_room()
    assert room is not None
    channel.send(room, slot, b"%d" % slot, is_saved)
    return room


def rooms_of(channel: Channel) -> Iterator[Bytes]:
    """All that it gets."""
    while (room := channel.take_room()) is not None:
        yield room


def addresses(rooms: Iterator[Bytes]) -> set[int]:
    return {int(room.ctypes.data) for room in rooms}


def test_a_block_is_written_to_its_slot_and_named_once_that_has_completed(world: World) -> None:
    channel = world.channel()
    room = send(channel, 5)
    assert world.sender.poll()
    (write,) = world.engine.writes.values()
    assert write == (room.ctypes.data, (1 << 32) + 5 * BLOCK_BYTES, BLOCK_BYTES)
    world.sender.poll()
    assert channel.take_written() == []
    world.engine.end(1)
    assert not world.sender.poll()
    assert channel.take_written() == [(5, b"5")]
    assert channel.take_written() == []
    assert channel.is_open


def test_nothing_is_written_before_it_is_saved_nor_before_what_was_queued_earlier(
    world: World,
) -> None:
    channel, save = world.channel(), Save()
    send(channel, 0, save.is_done)
    send(channel, 1)
    assert world.sender.poll()
    assert world.targets() == []
    save.done = True
    world.sender.poll()
    assert world.targets() == [0, 1]


def test_few_writes_are_under_way_at_once_and_the_next_follow_as_they_end(world: World) -> None:
    channel = world.channel()
    for slot in range(WRITES_MAX + 2):
        send(channel, slot)
    world.sender.poll()
    assert len(world.engine.under_way) == WRITES_MAX
    world.engine.end(2)
    world.sender.poll()
    assert world.targets() == list(range(WRITES_MAX + 1))
    assert channel.take_written() == [(1, b"1")]


def test_a_room_is_not_handed_out_again_while_its_write_reads_it(world: World) -> None:
    channel, other = world.channel(), world.channel(2)
    sent = send(channel, 0)
    world.sender.poll()
    assert sent.ctypes.data not in addresses(rooms_of(channel)) | addresses(rooms_of(other))


def test_all_rooms_come_back(world: World) -> None:
    channel = world.channel()
    for slot in range(3 * NUM_ROOMS):
        send(channel, slot)
        world.sender.poll()
        world.engine.end(slot + 1)
        world.sender.poll()
    assert len(list(rooms_of(channel))) == CHANNEL_ROOMS_MAX


def test_a_channel_whose_target_hangs_leaves_rooms_and_time_to_the_others(world: World) -> None:
    hung, healthy = world.channel(1), world.channel(2)
    for slot, room in enumerate(list(rooms_of(hung))):
        hung.send(room, slot, b"", saved)
    world.sender.poll()
    before = set(world.engine.writes)
    for slot in range(5):
        send(healthy, slot)
    while not world.sender.poll() or world.engine.under_way - before:
        for batch in world.engine.under_way - before:
            world.engine.end(batch)
    assert len(healthy.take_written()) == 5
    assert hung.take_room() is None
    assert hung.is_open


def test_a_failed_write_closes_the_channel_and_all_its_rooms_come_back(world: World) -> None:
    channel, other = world.channel(), world.channel(2)
    for slot in range(CHANNEL_ROOMS_MAX):
        send(channel, slot)
    world.sender.poll()
    world.engine.end(1, -1)
    world.sender.poll()
    assert not channel.is_open
    assert channel.take_room() is None
    assert len(world.engine.writes) == WRITES_MAX  # nothing more was begun
    for batch in list(world.engine.under_way):
        world.engine.end(batch, -1)
    assert not world.sender.poll()
    assert channel.take_written() == []
    num_free = sum(len(list(rooms_of(world.channel(rank)))) for rank in range(3, 10))
    assert num_free == NUM_ROOMS
    assert other.is_open


def test_the_room_of_a_block_that_is_not_saved_yet_stays_out_though_the_channel_is_closed(
    world: World,
) -> None:
    channel, save = world.channel(), Save()
    room = send(channel, 0, save.is_done)
    channel.fail("the control connection ended")
    others = [world.channel(rank) for rank in range(2, 7)]
    assert world.sender.poll()
    assert room.ctypes.data not in set.union(*(addresses(rooms_of(c)) for c in others))
    save.done = True
    assert not world.sender.poll()
    assert addresses(rooms_of(world.channel(8))) == {room.ctypes.data}
    assert world.engine.writes == {}


def test_a_room_that_was_taken_before_the_channel_closed_comes_back_when_it_is_sent(
    world: World,
) -> None:
    channel = world.channel()
    room = channel.take_room()
    assert room is not None
    channel.fail("the control connection ended")
    world.sender.poll()
    channel.send(room, 0, b"a", saved)
    assert not world.sender.poll()
    num_free = sum(len(list(rooms_of(world.channel(rank)))) for rank in range(2, 10))
    assert num_free == NUM_ROOMS


def test_a_write_that_cannot_start_closes_the_channel(world: World) -> None:
    channel = world.channel()
    world.engine.refuses = True
    send(channel, 0)
    assert not world.sender.poll()
    assert not channel.is_open


def test_the_room_of_a_write_that_timed_out_is_never_used_again_but_replaced(world: World) -> None:
    channel = world.channel()
    lost = send(channel, 0)
    world.sender.poll()
    world.engine.end(1, -2)
    assert not world.sender.poll()
    assert not channel.is_open
    assert lost.ctypes.data in world.engine.registered
    free = set.union(*(addresses(rooms_of(world.channel(rank))) for rank in range(2, 10)))
    assert len(free) == NUM_ROOMS
    assert lost.ctypes.data not in free


def lose(world: World, count: int) -> None:
    for _ in range(count):
        channel = world.channel()
        send(channel, 0)
        world.sender.poll()
        world.engine.end(len(world.engine.writes), -2)
        world.sender.poll()


def test_after_too_many_lost_rooms_nothing_is_sent_any_more(world: World) -> None:
    lose(world, LOST_ROOMS_MAX)
    assert world.channel().take_room() is not None
    lose(world, 1)
    assert world.channel().take_room() is None


def test_where_the_host_refuses_memory_for_another_room_nothing_is_raised(world: World) -> None:
    lose(world, 1)
    world.maker.refuses = True
    taken = [list(rooms_of(world.channel(rank))) for rank in range(2, 10)]
    assert sum(map(len, taken)) == NUM_ROOMS - 1


def test_a_write_that_never_ends_closes_the_channel_and_keeps_its_room(world: World) -> None:
    channel = world.channel()
    room = send(channel, 0)
    world.sender.poll()
    world.clock.advance(WRITE_TIMEOUT_S - 0.1)
    world.sender.poll()
    assert channel.is_open
    world.clock.advance(0.2)
    assert world.sender.poll()
    assert not channel.is_open
    free = set.union(*(addresses(rooms_of(world.channel(rank))) for rank in range(2, 10)))
    assert room.ctypes.data not in free
    world.engine.end(1)
    assert not world.sender.poll()
    assert addresses(rooms_of(world.channel(11))) == {room.ctypes.data}


def test_a_write_that_has_ended_is_not_late_however_late_the_sender_looks(world: World) -> None:
    channel = world.channel()
    send(channel, 0)
    world.sender.poll()
    world.engine.end(1)
    world.clock.advance(10 * WRITE_TIMEOUT_S)
    world.sender.poll()
    assert channel.is_open
    assert channel.take_written() == [(0, b"0")]


def test_a_closed_channel_keeps_its_first_reason(world: World) -> None:
    channel = world.channel()
    channel.fail("one")
    channel.fail("two")
    assert channel.failure == "one"
