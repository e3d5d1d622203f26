"""When an outbox may touch its memory, and what becomes of messages that no write could carry."""

from __future__ import annotations

import ctypes

import pytest

from gpu_worker.exchange.message import TAIL_BYTES, MessageLayout
from gpu_worker.exchange.mooncake_engine import Protocols
from gpu_worker.exchange.outbox import Link, WriteStatus
from gpu_worker.exchange.regions import QUARANTINE_S, Quarantine, Regions
from gpu_worker.exchange.transfer_outbox import TransferOutbox
from shared.types import Incarnation, Member, RankId
from tests.support.scripted_engine import ScriptedEngine

LAYOUT = MessageLayout(hidden_size=4, top_k=2, step_tokens_max=4)
PEER = Member(rank=RankId(1), incarnation=Incarnation(1))


def written(engine: ScriptedEngine) -> list[tuple[int, int]]:
    """Remote address and length of each write, in order."""
    return [(write.target, write.length) for write in engine.writes.values()]


def make(
    engine: ScriptedEngine, generation: int = 1, protocol: Protocols = Protocols.TCP
) -> TransferOutbox:
    link = Link(target=PEER, generation=generation, transfer_name="a:1", address=generation << 32)
    return TransferOutbox(engine, LAYOUT, link, protocol)


def test_a_regions_memory_is_not_handed_out_while_a_write_reads_it() -> None:
    engine = ScriptedEngine()
    outbox = make(engine)
    outbox.commit(0, 128)
    assert outbox.poll_write(0) is WriteStatus.PENDING
    with pytest.raises(AssertionError):
        outbox.commit(0, 128)
    outbox.commit(1, 128)
    engine.end(1, 1)
    assert outbox.poll_write(0) is WriteStatus.DONE
    outbox.commit(0, 128)


def test_a_message_is_one_write_over_tcp() -> None:
    engine = ScriptedEngine()
    make(engine).commit(2, 128)
    assert written(engine) == [((1 << 32) + LAYOUT.message_buffer(2)[0], 128)]


def test_over_rdma_the_tail_goes_only_after_the_payload_has_arrived() -> None:
    engine = ScriptedEngine()
    outbox = make(engine, protocol=Protocols.RDMA)
    start = (1 << 32) + LAYOUT.message_buffer(0)[0]
    outbox.commit(0, 128)
    assert outbox.progress()
    assert written(engine) == [(start, 128 - TAIL_BYTES)]
    engine.end(1, 1)
    assert outbox.progress()
    assert written(engine)[1:] == [(start + 128 - TAIL_BYTES, TAIL_BYTES)]
    engine.end(2, 1)
    assert not outbox.progress()
    assert outbox.poll_write(0) is WriteStatus.DONE


@pytest.mark.parametrize("status", [-1, -2])
def test_a_failed_write_is_not_tried_again_and_its_message_goes_over_the_next_link(
    status: int,
) -> None:
    engine = ScriptedEngine()
    old = make(engine)
    ctypes.memset(old.heads[0], 5, 128)
    old.commit(0, 128)
    engine.end(1, status)
    assert old.poll_write(0) is WriteStatus.FAILED
    assert old.broken
    ctypes.memset(old.heads[3], 6, 64)
    old.commit(3, 64)
    assert len(engine.writes) == 1
    new = make(engine, generation=2)
    new.take_over(old)
    starts = [(2 << 32) + LAYOUT.message_buffer(index)[0] for index in (0, 3)]
    assert written(engine)[1:] == [(starts[0], 128), (starts[1], 64)]


def test_a_write_that_cannot_start_breaks_the_outbox() -> None:
    engine = ScriptedEngine()
    engine.refuses = True
    outbox = make(engine)
    outbox.commit(0, 128)
    assert outbox.broken
    assert outbox.poll_write(0) is WriteStatus.FAILED


def test_memory_that_a_write_may_still_read_is_released_after_its_quarantine_only() -> None:
    engine, quarantine = ScriptedEngine(), Quarantine()
    outbox = make(engine)
    outbox.commit(0, 128)
    quarantine.put(outbox, now=100.0)
    assert engine.registered
    engine.end(1, -2)
    quarantine.sweep(100.0 + QUARANTINE_S - 1)
    assert engine.registered
    quarantine.sweep(100.0 + QUARANTINE_S)
    assert not engine.registered


def test_memory_is_released_when_all_writes_have_ended() -> None:
    engine, quarantine = ScriptedEngine(), Quarantine()
    outbox = make(engine)
    outbox.commit(0, 128)
    quarantine.put(outbox, now=100.0)
    assert engine.registered
    engine.end(1, 1)
    quarantine.sweep(100.0)
    assert not engine.registered


def test_memory_that_no_write_uses_is_released_at_once() -> None:
    engine = ScriptedEngine()
    Quarantine().put(make(engine), now=100.0)
    assert not engine.registered


def test_no_region_is_given_twice_and_none_released_before_its_quarantine() -> None:
    engine, quarantine = ScriptedEngine(), Quarantine()
    regions = Regions(engine, LAYOUT, quarantine)
    first = regions.give(PEER, 1, 0.0)
    assert regions.give(PEER, 1, 0.0) is first
    second = regions.give(PEER, 2, 0.0)
    assert second.address != first.address
    with pytest.raises(ValueError, match="generation"):
        regions.give(PEER, 1, 0.0)
    assert regions.of(PEER) == (second, first)
    regions.retire(PEER, now=100.0)
    assert regions.of(PEER) == ()
    quarantine.sweep(100.0 + QUARANTINE_S - 1)
    assert engine.registered == {first.address, second.address}
    quarantine.sweep(100.0 + QUARANTINE_S)
    assert not engine.registered


def test_the_regions_of_an_incarnation_that_has_ended_are_quarantined_as_well() -> None:
    engine, quarantine = ScriptedEngine(), Quarantine()
    regions = Regions(engine, LAYOUT, quarantine)
    given = regions.give(PEER, 1, 0.0)
    regions.retire_all(now=100.0)
    assert regions.of(PEER) == ()
    assert engine.registered == {given.address}
    quarantine.sweep(100.0 + QUARANTINE_S)
    assert not engine.registered
