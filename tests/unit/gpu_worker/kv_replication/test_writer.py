"""Who is sent what, in which order, and what happens when a target is lost, full or slow."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.kv_replication.writer import BLOCKS_PER_PUMP, ReplicaWriter
from shared.types import RankId, SessionId
from tests.unit.gpu_worker.kv_replication.fakes import (
    BLOCK_BYTES,
    ArrayCache,
    Channel,
    Endpoint,
    Store,
    content_of,
    member,
)

ME = RankId(2)


class Source:
    """A rank with a session's blocks in its cache. Chains of one letter share their names."""

    def __init__(
        self, *channels: Channel, blocks_per_pump: int = 100, store: Store | None = None
    ) -> None:
        self.endpoint = Endpoint(*channels, store=store)
        self.cache = ArrayCache(np.zeros((2000, BLOCK_BYTES), dtype=np.uint8))
        self.writer = ReplicaWriter(
            self.cache, self.endpoint, rank=ME, blocks_per_pump=blocks_per_pump
        )
        self.writer.use([channel.target for channel in channels])
        self.num_blocks = 0
        self.blocks_of: dict[str, list[int]] = {}

    def offer(self, session: str, chain: str, begin: int, end: int) -> None:
        """Blocks begin … end-1 of this chain."""
        names = names_of(chain, end)[begin:]
        blocks = list(range(self.num_blocks, self.num_blocks + len(names)))
        self.num_blocks += len(names)
        for name, block in zip(names, blocks, strict=True):
            self.cache.rows[block] = content_of(name)
        self.blocks_of.setdefault(session, []).extend(blocks)
        self.writer.offer(SessionId(session), names, blocks)

    def forget(self, session: str) -> None:
        """Its blocks are written by others from now on."""
        self.writer.forget(SessionId(session))
        self.cache.rows[self.blocks_of.pop(session, [])] = 0

    def backup_of(self, session: str) -> int | None:
        return self.writer.backup_of(SessionId(session))

    def pump_out(self) -> None:
        """Until nothing is under way."""
        for _ in range(50):
            self.writer.send_offered()
            for channel in self.endpoint.all:
                channel.deliver_all()
        self.writer.send_offered()


def names_of(chain: str, num_blocks: int) -> list[bytes]:
    return [f"{chain}{column}".encode() for column in range(num_blocks)]


def test_a_chain_is_sent_in_order_and_its_content_is_known_by_its_names() -> None:
    channel = Channel(member(0))
    source = Source(channel)
    source.offer("s", "a", 0, 3)
    source.pump_out()
    source.offer("s", "a", 3, 5)
    source.pump_out()
    assert channel.sent == names_of("a", 5)
    assert set(channel.known) == {*names_of("a", 5)}
    for name in names_of("a", 5):
        content = channel.region.content(name)
        assert content is not None
        assert content.tolist() == content_of(name)


def test_a_backup_rank_is_named_once_it_has_the_first_block() -> None:
    channel = Channel(member(0))
    source = Source(channel)
    source.offer("s", "a", 0, 2)
    assert source.backup_of("s") is None
    source.writer.send_offered()
    assert source.backup_of("s") is None
    channel.deliver_all()
    source.writer.send_offered()
    assert source.backup_of("s") == 0
    assert source.backup_of("unknown") is None


def test_little_is_sent_at_a_time_and_nothing_once_all_is() -> None:
    channel = Channel(member(0), num_slots=64, num_staging_buffers=64)
    source = Source(channel, blocks_per_pump=BLOCKS_PER_PUMP)
    source.offer("s", "a", 0, 2 * BLOCKS_PER_PUMP + 1)
    assert source.writer.send_offered()
    assert len(channel.sent) == BLOCKS_PER_PUMP
    assert source.writer.send_offered()
    assert not source.writer.send_offered()
    assert len(channel.sent) == 2 * BLOCKS_PER_PUMP + 1


def test_with_all_sent_no_channel_is_asked_anything() -> None:
    channels = [Channel(member(0)), Channel(member(1))]
    source = Source(*channels)
    for session in "ab":
        source.offer(session, session, 0, 3)
    source.pump_out()
    for channel in channels:
        del channel.is_open  # who asks for it now fails
    assert not source.writer.send_offered()


def test_sessions_and_targets_take_turns() -> None:
    channels = [Channel(member(0)), Channel(member(1))]
    source = Source(*channels, blocks_per_pump=6)
    for session in "abcd":
        source.offer(session, session, 0, 9)
    source.writer.send_offered()
    assert [channel.sent for channel in channels] == [
        [b"a0", b"c0", b"a1"],
        [b"b0", b"d0", b"b1"],
    ]
    source.writer.send_offered()
    assert [len(channel.sent) for channel in channels] == [6, 6]


def test_targets_far_behind_each_other_are_all_served() -> None:
    channels = [Channel(member(rank)) for rank in (0, 1, 3, 4)]
    source = Source(*channels, blocks_per_pump=1)
    for session in "abcd":
        source.offer(session, session, 0, 4)
    for _ in range(4):
        source.writer.send_offered()
    assert [len(channel.sent) for channel in channels] == [1, 1, 1, 1]


def test_what_was_sent_for_one_session_is_not_sent_for_the_next() -> None:
    channel = Channel(member(0))
    source = Source(channel)
    source.offer("s", "a", 0, 3)
    source.pump_out()
    source.offer("t", "a", 0, 4)
    source.pump_out()
    assert channel.sent == names_of("a", 4)
    assert source.backup_of("t") == 0


def test_sessions_spread_over_the_targets_from_ones_own_rank_on() -> None:
    source = Source(*(Channel(member(rank)) for rank in (0, 1, 3, 4)))
    for session in "abcdef":
        source.offer(session, session, 0, 1)
        source.pump_out()
    assert [source.backup_of(session) for session in "abcdef"] == [3, 4, 0, 1, 3, 4]


def test_another_node_is_preferred() -> None:
    near, far = Channel(member(0), is_on_other_node=False), Channel(member(3))
    source = Source(near, far)
    for session in "ab":
        source.offer(session, session, 0, 1)
    source.pump_out()
    assert [source.backup_of(session) for session in "ab"] == [3, 3]


def test_on_one_node_a_copy_on_it_is_better_than_none() -> None:
    source = Source(Channel(member(0), is_on_other_node=False))
    source.offer("s", "a", 0, 1)
    source.pump_out()
    assert source.backup_of("s") == 0


def test_who_is_in_no_map_or_has_no_room_or_no_channel_gets_nothing() -> None:
    outside, empty = Channel(member(0)), Channel(member(1), num_slots=0)
    old_incarnation = Channel(member(3, incarnation=1))
    source = Source(outside, empty, old_incarnation)
    source.writer.use([member(1), member(3, incarnation=2), member(4)])
    source.offer("s", "a", 0, 1)
    assert not source.writer.send_offered()
    assert [channel.sent for channel in source.endpoint.all] == [[], [], []]
    source.endpoint.all.append(late := Channel(member(4)))
    source.pump_out()
    assert (source.backup_of("s"), late.sent) == (4, [b"a0"])


def test_a_session_starts_over_elsewhere_when_its_channel_closes_in_mid_way() -> None:
    first, second = Channel(member(0)), Channel(member(1))
    source = Source(first, second)
    source.offer("s", "a", 0, 4)
    source.writer.send_offered()
    for _ in range(8):
        first.deliver()
    source.writer.send_offered()
    first.close()
    source.offer("s", "a", 4, 5)
    source.pump_out()
    assert second.sent == names_of("a", 5)
    assert source.backup_of("s") == 1


def test_a_new_channel_to_the_same_rank_knows_nothing_of_the_old_one() -> None:
    old = Channel(member(0))
    source = Source(old)
    source.offer("s", "a", 0, 3)
    source.pump_out()
    old.close()
    source.endpoint.all = [new := Channel(member(0))]
    source.offer("s", "a", 3, 4)
    source.offer("t", "b", 0, 1)
    source.pump_out()
    assert sorted(new.sent) == [*names_of("a", 4), b"b0"]


def test_a_target_that_leaves_the_map_is_left_and_its_sessions_spread() -> None:
    channels = [Channel(member(rank)) for rank in (0, 1, 3)]
    source = Source(*channels)
    for session in "abcdef":
        source.offer(session, session, 0, 2)
    source.pump_out()
    assert [source.backup_of(session) for session in "abcdef"] == [3, 0, 1, 3, 0, 1]
    source.writer.use([member(1), member(3)])
    assert [source.backup_of(session) for session in "be"] == [None, None]
    source.pump_out()
    assert [source.backup_of(session) for session in "abcdef"] == [3, 3, 1, 3, 1, 1]
    assert {b"b0", b"b1"} <= {*channels[2].known}
    assert {b"e0", b"e1"} <= {*channels[1].known}


def test_in_a_full_area_a_prefix_is_kept_and_the_rest_waits_for_another_sessions_end() -> None:
    channel = Channel(member(0), num_slots=8)
    source = Source(channel)
    source.offer("s", "a", 0, 6)
    source.pump_out()
    source.offer("t", "b", 0, 6)
    source.pump_out()
    assert channel.sent == [*names_of("a", 6), *names_of("b", 2)]
    assert not source.writer.send_offered()
    assert [source.backup_of(session) for session in "st"] == [0, 0]
    source.forget("s")
    source.pump_out()
    assert channel.sent[6:] == names_of("b", 6)
    assert {*names_of("b", 6)} <= {*channel.known}


def test_a_full_region_is_passed_over_if_another_has_free_slots() -> None:
    channels = [Channel(member(3), num_slots=2), Channel(member(4))]
    source = Source(*channels)
    for session in "abc":
        source.offer(session, session, 0, 2)
        source.pump_out()
    assert [source.backup_of(session) for session in "abc"] == [3, 4, 4]


def test_a_slow_channel_holds_up_no_other_and_goes_on_when_it_has_staging_buffers_again() -> None:
    slow, other = Channel(member(0), num_staging_buffers=1), Channel(member(1))
    source = Source(slow, other)
    source.offer("s", "a", 0, 3)
    source.offer("t", "b", 0, 3)
    assert source.writer.send_offered()
    assert (slow.sent, other.sent) == (names_of("a", 1), names_of("b", 3))
    assert source.writer.send_offered()
    slow.deliver_all()
    assert source.writer.send_offered()
    assert slow.sent == names_of("a", 2)
    source.pump_out()
    assert slow.sent == names_of("a", 3)


def test_sessions_take_turns_also_if_staging_buffers_are_scarce() -> None:
    channel = Channel(member(0), num_staging_buffers=1)
    source = Source(channel)
    source.offer("s", "a", 0, 2)
    source.offer("t", "b", 0, 2)
    source.pump_out()
    assert channel.sent == [b"a0", b"b0", b"a1", b"b1"]


def test_copies_of_an_ended_session_stay_until_their_room_is_wanted() -> None:
    channel = Channel(member(0), num_slots=8)
    source = Source(channel)
    source.offer("s", "a", 0, 4)
    source.pump_out()
    source.forget("s")
    source.pump_out()
    assert {*channel.known} == {*names_of("a", 4)}
    source.offer("t", "b", 0, 4)
    source.pump_out()
    assert {*channel.known} == {*names_of("a", 3), *names_of("b", 4)}


def test_nothing_is_sent_of_a_session_that_has_ended() -> None:
    channel = Channel(member(0))
    source = Source(channel)
    source.offer("s", "a", 0, 4)
    source.forget("s")
    source.forget("unknown")
    assert not source.writer.send_offered()
    assert channel.sent == []
    source.offer("s", "a", 0, 1)
    source.pump_out()
    assert channel.sent == [b"a0"]


def test_what_is_left_of_a_session_that_ends_in_mid_way_is_not_sent() -> None:
    channel = Channel(member(0), num_staging_buffers=2)
    source = Source(channel)
    source.offer("s", "a", 0, 4)
    source.writer.send_offered()
    source.forget("s")
    source.pump_out()
    assert {*channel.known} == {b"a0", b"a1"} == {*channel.sent}
    assert channel.region.content(b"a1") is not None


def test_blocks_are_restored_in_order_up_to_the_first_that_is_missing() -> None:
    store = Store(is_lost=lambda name: name == b"a3")
    peer = Source(Channel(member(0), store))
    peer.offer("s", "a", 0, 6)
    peer.pump_out()
    here = Source(store=store)
    assert here.writer.restore(names_of("a", 6), range(10, 16)) == 3
    expected = [content_of(name) for name in names_of("a", 3)] + [[0] * BLOCK_BYTES] * 3
    assert here.cache.rows[10:16].tolist() == expected
    assert here.writer.restore(names_of("b", 2), [1, 2]) == 0


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["offer", "offer", "send_offered", "send_offered", "deliver", "deliver", "end", "break"]
        ),
        st.integers(0, 30),
    ),
    max_size=150,
)


@settings(max_examples=200, deadline=None)
@given(num_slots=st.integers(1, 9), num_staging_buffers=st.integers(1, 3), events=EVENTS)
def test_what_is_known_is_whole_whatever_comes_in_which_order(
    num_slots: int, num_staging_buffers: int, events: list[tuple[str, int]]
) -> None:
    """The regions themselves fail where a slot is written that is known."""

    def open_channel(rank: int) -> Channel:
        return Channel(member(rank), num_slots=num_slots, num_staging_buffers=num_staging_buffers)

    source = Source(*(open_channel(rank) for rank in range(2)), blocks_per_pump=3)
    channels = source.endpoint.all
    lengths: dict[str, int] = {}
    for event, number in events:
        session = f"s{number % 5}"
        if event == "offer":
            begin = lengths.get(session, 0)
            lengths[session] = begin + 1 + number % 3
            source.offer(session, "ab"[number % 2 if begin == 0 else 0], begin, lengths[session])
        elif event == "end":
            lengths.pop(session, None)
            source.forget(session)
        elif event == "send_offered":
            source.writer.send_offered()
        elif event == "deliver":
            channels[number % 2].deliver(number // 2)
        elif number % 4 == 0:
            channels[number // 4 % 2].close()
            channels[number // 4 % 2] = open_channel(number // 4 % 2)
        for region in (channel.region for channel in channels):
            for slot, name in region.known.items():
                assert region.slots[slot].tolist() == content_of(name)
            assert len({*region.known.values()}) == len(region.known)
    source.pump_out()
    for session in lengths:
        source.forget(session)
    source.offer("last", "z", 0, 1)
    source.pump_out()
    assert source.backup_of("last") is not None
    assert not source.writer.send_offered()
