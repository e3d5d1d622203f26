"""Copies of KV blocks over real Mooncake between real processes: they arrive whole, outlive their
source, and neither death nor hanging of a target holds anybody up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import pytest

from shared.confinement import confined_environment
from shared.records import RankRecord
from shared.types import Incarnation, Member, RankId
from tests.support.kv_replication_child import HOST, NUM_SLOTS, content_of, main

WAIT_S = 60.0
SECONDS_S = 20.0  # Mooncake's own patience is 1 s, that with a Pong 5 s
POLL_S = 0.02


class Rank:
    """The parent's end of one child."""

    def __init__(self, rank: int, incarnation: int, layout: str, keeps: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.member = Member(rank=RankId(rank), incarnation=Incarnation(incarnation))
        self._pipe, theirs = context.Pipe()
        self._seen: list[tuple[str, Any]] = []
        self.process = context.Process(
            target=main, args=(self.member, theirs, layout, keeps), daemon=True
        )
        self.process.start()
        theirs.close()

    @property
    def rank(self) -> RankId:
        return self.member.rank

    @cached_property
    def record(self) -> RankRecord:
        record: RankRecord = self.expect("record")
        return record

    def tell(self, kind: str, value: Any = None) -> None:
        self._pipe.send((kind, value))

    def expect(self, kind: str, fits: Callable[[Any], bool] = lambda value: True) -> Any:
        """The next event of this kind, waiting for it; others are kept."""
        while True:
            for event in self._seen:
                if event[0] == kind and fits(event[1]):
                    self._seen.remove(event)
                    return event[1]
            assert self._pipe.poll(WAIT_S), f"rank {self.rank}: no {kind!r}, only {self._seen}"
            self._seen.append(self._pipe.recv())

    def ask(self, kind: str, value: Any = None) -> Any:
        self.tell(kind, value)
        return self.expect(kind)

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def expect_link(self, event: str, peer: Rank) -> Any:
        return self.expect("log", lambda e: e["event"] == event and e["peer"] == str(peer.member))

    def send(self, to: Rank, names: dict[int, bytes]) -> None:
        """Until they are known there."""
        for slot, name in names.items():
            self.tell("send", (to.rank, slot, name))
        assert sorted(self.gather("sent", to, len(names))) == sorted(names.values())

    def drop(self, to: Rank, slots: list[int]) -> None:
        self.tell("drop", (to.rank, slots))
        assert sorted(self.gather("dropped", to, len(slots))) == sorted(slots)

    def gather(self, kind: str, to: Rank, count: int) -> list[Any]:
        """So many answers, of as many questions as it takes."""
        answers: list[Any] = []

        def has_all() -> bool:
            answers.extend(self.ask(kind, to.rank))
            return len(answers) >= count

        until(has_all)
        return answers

    def num_flooded(self, to: Rank) -> int:
        """Blocks sent since the flood began, over a channel that is open."""
        is_open, num_sent = self.ask("flooded", to.rank)
        assert is_open
        return int(num_sent)

    def expect_flooding(self, to: Rank, more: int = 100) -> None:
        target = self.num_flooded(to) + more
        until(lambda: self.num_flooded(to) >= target)

    def expect_only_whole_blocks(self) -> None:
        num_seen, num_wrong = self.ask("verified")
        assert num_seen > 0
        assert num_wrong == 0


def until(is_so: Callable[[], bool], limit_s: float = WAIT_S) -> None:
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(POLL_S)


Start = Callable[..., Rank]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    for name, value in confined_environment(os.environ, HOST).items():
        monkeypatch.setenv(name, value)
    started: list[Rank] = []

    def begin(rank: int, incarnation: int = 1, layout: str = "toy", keeps: bool = True) -> Rank:
        started.append(Rank(rank, incarnation, layout, keeps))
        return started[-1]

    yield begin
    for rank in started:
        rank.process.kill()
        rank.process.join()


def introduce(rank: Rank, *peers: Rank) -> None:
    """Tells the rank of its peers' records, and each peer of the rank's."""
    for peer in peers:
        peer.tell("keep", rank.record)
        rank.tell("keep", peer.record)


def test_blocks_arrive_whole_are_dropped_and_make_room_for_others(start: Start) -> None:
    source, target = start(0), start(1)
    introduce(source, target)
    source.expect_link("kv_replica_link_open", target)
    assert source.ask("channels") == {1: (True, NUM_SLOTS)}
    names = {slot: b"block-%d" % slot for slot in range(5)}
    source.send(target, names)
    assert [target.ask("find", name) for name in names.values()] == [True] * 5
    assert source.ask("find", names[0]) is None
    source.drop(target, [1, 3])
    found = [target.ask("find", name) for name in names.values()]
    assert found == [True, None, True, None, True]
    source.send(target, {3: b"another"})
    assert target.ask("find", b"another")
    target.expect_link("kv_replica_link_open", source)
    target.send(source, {0: b"the other way"})
    assert source.ask("find", b"the other way")


def test_a_block_that_a_stranger_has_changed_is_not_believed(start: Start) -> None:
    """Mooncake lets anybody on the data network write: one byte, of one block."""
    source, target, stranger = start(0), start(1), start(2)
    introduce(source, target)
    source.expect_link("kv_replica_link_open", target)
    names = {slot: b"block-%d" % slot for slot in range(3)}
    source.send(target, names)
    where, address = source.ask("slot_address", (target.rank, 1))
    changed = address + next(i for i, byte in enumerate(content_of(names[1])) if byte != 0xFF)
    assert stranger.ask("overwrite", (where, changed)), "it was not confined"
    assert [target.ask("find", name) for name in names.values()] == [True, None, True]
    assert target.ask("rejected") == 1
    target.expect("log", lambda e: e["event"] == "kv_replica_rejected")


def test_what_is_found_is_whole_while_slots_are_dropped_and_written_anew(start: Start) -> None:
    source, target, other = start(0), start(1), start(2)
    introduce(source, target, other)
    for each in (target, other):
        source.expect_link("kv_replica_link_open", each)
        source.tell("flood", each.rank)
    for each in (target, other):
        source.expect_flooding(each, more=20 * NUM_SLOTS)
        each.expect_only_whole_blocks()


def test_the_blocks_of_a_killed_source_are_found_also_after_its_restart(
    start: Start,
) -> None:
    source, target = start(0), start(1)
    introduce(source, target)
    source.expect_link("kv_replica_link_open", target)
    source.send(target, {slot: b"block-%d" % slot for slot in range(NUM_SLOTS)})
    source.signal(signal.SIGKILL)
    target.expect_link("kv_replica_link_broken", source)
    target.tell("close", source.member)
    assert [target.ask("find", b"block-%d" % slot) for slot in range(NUM_SLOTS)] == (
        [True] * NUM_SLOTS
    )
    again = start(0, incarnation=2)
    introduce(again, target)
    again.expect_link("kv_replica_link_open", target)
    again.send(target, {0: b"of the next life"})
    assert target.ask("find", b"of the next life")
    assert target.ask("find", b"block-0")
    target.expect_link("kv_replica_link_open", again)


def test_a_killed_target_takes_its_channel_with_it_and_no_other(start: Start) -> None:
    source, target, other = start(0), start(1), start(2)
    introduce(source, target, other)
    for each in (target, other):
        source.expect_link("kv_replica_link_open", each)
        source.tell("flood", each.rank)
        source.expect_flooding(each)
    target.signal(signal.SIGKILL)
    until(lambda: not source.ask("flooded", target.rank)[0], SECONDS_S)
    source.expect_flooding(other)
    source.expect_link("kv_replica_link_broken", target)
    assert list(source.ask("channels")) == [other.rank]
    other.expect_only_whole_blocks()


def test_a_stopped_target_holds_nobody_up_and_is_of_use_again_when_it_goes_on(
    start: Start,
) -> None:
    source, target, other = start(0), start(1), start(2)
    introduce(source, target, other)
    for each in (target, other):
        source.expect_link("kv_replica_link_open", each)
        source.tell("flood", each.rank)
        source.expect_flooding(each)
    target.signal(signal.SIGSTOP)
    until(lambda: not source.ask("flooded", target.rank)[0], SECONDS_S)
    source.expect_flooding(other)
    source.expect_link("kv_replica_link_broken", target)
    late = start(3)
    introduce(late, source)
    source.expect_link("kv_replica_link_open", late)  # nothing waits for the one that hangs
    source.expect_flooding(other)
    target.signal(signal.SIGCONT)
    source.expect_link("kv_replica_link_open", target)
    target.expect_only_whole_blocks()
    source.tell("flood", target.rank)
    source.expect_flooding(target)
    target.expect_only_whole_blocks()
    other.expect_only_whole_blocks()


@pytest.mark.parametrize(
    ("of_target", "why"),
    [({"layout": "other"}, "of no use"), ({"keeps": False}, "keeps no KV replicas")],
)
def test_a_peer_that_keeps_none_says_why(start: Start, of_target: dict[str, Any], why: str) -> None:
    source, target = start(0), start(1, **of_target)
    introduce(source, target)
    assert why in source.expect_link("kv_replica_link_broken", target)["detail"]
    assert source.ask("channels") == {}
