"""What is found by name is whole: which slots are known, for how long, and what late messages and
late writes change about it."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from gpu_worker.exchange.regions import QUARANTINE_S
from gpu_worker.kv_replication.block_form import BlockForm
from gpu_worker.kv_replication.block_tags import TAG_BYTES, BlockTags
from gpu_worker.kv_replication.region import ReplicaRegion
from gpu_worker.kv_replication.store import RETENTION_S, StoredReplicas
from shared.handshake import Access
from shared.types import Incarnation, Member, RankId
from shared.wire import DropKvReplicas, KvReplicasStored, OpenKvReplicaRegion
from tests.support.scripted_engine import ScriptedEngine

BLOCK_BYTES = 512
NUM_SLOTS = 4
FORM = BlockForm(layout="toy", block_bytes=BLOCK_BYTES)
TAGS = BlockTags(Access("toy", b"a secret"))
NOW = 100.0


def source(rank: int = 1, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def request(
    of: Member, generation: int = 1, layout: str = "toy", block_bytes: int = BLOCK_BYTES
) -> OpenKvReplicaRegion:
    return OpenKvReplicaRegion(
        source=of, generation=generation, layout=layout, block_bytes=block_bytes
    )


def kept(
    of: Member, names: dict[int, bytes], generation: int = 1, value: int = 0
) -> KvReplicasStored:
    """`value` is what the source has written to all bytes of these slots."""
    content = np.full(BLOCK_BYTES, value, dtype=np.uint8)
    return KvReplicasStored(
        source=of,
        generation=generation,
        slots=tuple(names),
        names=tuple(names.values()),
        tags=tuple(TAGS.tag(name, content) for name in names.values()),
    )


def drop(of: Member, *slots: int, generation: int = 1) -> DropKvReplicas:
    return DropKvReplicas(source=of, generation=generation, slots=slots)


def write(region: ReplicaRegion, slot: int, value: int) -> None:
    """As it comes from outside."""
    ctypes.memset(region.address + slot * BLOCK_BYTES, value, BLOCK_BYTES)


def value_of(store: StoredReplicas, name: bytes) -> int | None:
    """Of all bytes of the block, where it is found."""
    found = store.find(name)
    if found is None:
        return None
    assert found.size == BLOCK_BYTES
    (value,) = set(found.tolist())
    return int(value)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def store(engine: ScriptedEngine) -> StoredReplicas:
    """With sources 1 and 2, which have records."""
    made = StoredReplicas(engine, FORM, TAGS, region_bytes=NUM_SLOTS * BLOCK_BYTES + 100)
    for rank in (1, 2):
        made.on_member_present(source(rank))
    return made


def test_a_block_is_found_by_its_name_from_the_message_to_the_drop(store: StoredReplicas) -> None:
    region = store.give(request(source()), NOW)
    assert region.num_slots == NUM_SLOTS
    for slot in range(NUM_SLOTS):
        write(region, slot, 10 + slot)
    assert store.find(b"b") is None
    store.keep(kept(source(), {1: b"a"}, value=11))
    store.keep(kept(source(), {3: b"b"}, value=13))
    assert value_of(store, b"b") == 13
    assert store.drop(drop(source(), 3)).is_done()
    assert store.find(b"b") is None
    assert value_of(store, b"a") == 11


@pytest.mark.parametrize(("first", "last"), [(1, 2), (2, 1)])
def test_what_several_sources_keep_is_found_as_long_as_one_of_them_does(
    store: StoredReplicas, first: int, last: int
) -> None:
    for rank in (1, 2):
        write(store.give(request(source(rank)), NOW), rank, rank)
        store.keep(kept(source(rank), {rank: b"a"}, value=rank))
    store.drop(drop(source(first), first))
    assert value_of(store, b"a") == last
    store.drop(drop(source(last), last))
    assert store.find(b"a") is None


def test_what_was_found_stays_as_it_was_checked(store: StoredReplicas) -> None:
    """It is a copy: nobody has to wait for whoever uses it, and no later write reaches it."""
    region = store.give(request(source()), NOW)
    store.keep(kept(source(), {0: b"a"}))
    found = store.find(b"a")
    assert found is not None
    assert store.drop(drop(source(), 0)).is_done()
    write(region, 0, 9)
    assert set(found.tolist()) == {0}


def test_one_changed_byte_is_not_believed_and_forgotten(store: StoredReplicas) -> None:
    region = store.give(request(source()), NOW)
    store.keep(kept(source(), {0: b"a", 1: b"b"}))
    ctypes.memset(region.address + BLOCK_BYTES - 1, 1, 1)
    assert store.find(b"a") is None
    assert store.find(b"b") is not None
    assert store.num_rejected == 1
    ctypes.memset(region.address + BLOCK_BYTES - 1, 0, 1)
    assert store.find(b"a") is None


def test_a_replica_of_another_source_stands_in_for_a_changed_one(store: StoredReplicas) -> None:
    first, second = (store.give(request(source(rank)), NOW) for rank in (1, 2))
    write(first, 0, 3)
    write(second, 0, 5)
    store.keep(kept(source(1), {0: b"a"}))
    store.keep(kept(source(2), {0: b"a"}, value=5))
    assert value_of(store, b"a") == 5
    assert store.num_rejected == 1


def test_a_genuine_block_counts_under_its_own_name_and_in_its_own_instance_alone() -> None:
    content = np.arange(BLOCK_BYTES, dtype=np.uint16).view(np.uint8)[:BLOCK_BYTES]
    tag = TAGS.tag(b"a", content)
    assert TAGS.is_genuine(b"a", content, tag)
    assert not TAGS.is_genuine(b"b", content, tag)
    for other in (Access("toy", b"another secret"), Access("other", b"a secret")):
        assert not BlockTags(other).is_genuine(b"a", content, tag)


def test_a_newer_generation_gets_fresh_memory_and_the_older_ones_blocks_are_forgotten(
    store: StoredReplicas,
) -> None:
    old = store.give(request(source(), 3), NOW)
    store.keep(kept(source(), {0: b"a"}, generation=3))
    new = store.give(request(source(), 4), NOW)
    assert store.find(b"a") is None
    write(new, 0, 7)
    store.keep(kept(source(), {0: b"b"}, generation=4, value=7))
    write(old, 0, 9)  # a late one
    assert value_of(store, b"b") == 7


def test_late_messages_of_an_older_generation_change_nothing(store: StoredReplicas) -> None:
    store.give(request(source(), 1), NOW)
    store.give(request(source(), 2), NOW)
    store.keep(kept(source(), {0: b"new"}, generation=2))
    store.keep(kept(source(), {1: b"old"}, generation=1))
    assert store.find(b"old") is None
    assert store.drop(drop(source(), 0, generation=1)).is_done()
    assert store.find(b"new") is not None


def test_a_late_request_gets_nothing_and_takes_nothing(
    store: StoredReplicas, engine: ScriptedEngine
) -> None:
    region = store.give(request(source(), 2), NOW)
    store.keep(kept(source(), {0: b"a"}, generation=2))
    for generation in (1, 2):
        with pytest.raises(ValueError, match="later generation"):
            store.give(request(source(), generation), NOW)
    assert engine.registered == {region.address}
    assert store.find(b"a") is not None


@pytest.mark.parametrize(
    "asked",
    [request(source(), layout="other"), request(source(), block_bytes=BLOCK_BYTES + 1)],
)
def test_blocks_of_another_form_are_refused(
    store: StoredReplicas, asked: OpenKvReplicaRegion
) -> None:
    with pytest.raises(ValueError, match="of no use"):
        store.give(asked, NOW)


def test_a_budget_below_one_block_is_a_refusal(engine: ScriptedEngine) -> None:
    store = StoredReplicas(engine, FORM, TAGS, region_bytes=BLOCK_BYTES - 1)
    with pytest.raises(ValueError, match="no memory"):
        store.give(request(source()), NOW)


def test_a_source_without_a_region_is_told_so(store: StoredReplicas) -> None:
    with pytest.raises(ValueError, match="keeps nothing"):
        store.keep(kept(source(), {0: b"a"}))
    with pytest.raises(ValueError, match="keeps nothing"):
        store.drop(drop(source(), 0))
    store.give(request(source(), 1), NOW)
    with pytest.raises(ValueError, match="keeps nothing"):
        store.keep(kept(source(), {0: b"a"}, generation=2))
    assert store.find(b"a") is None


@pytest.mark.parametrize(
    "message",
    [
        kept(source(), {0: b"a", NUM_SLOTS: b"b"}),
        kept(source(), {0: b"a", -1: b"b"}),
        kept(source(), {0: b"a", 2: b"b"}),  # 2 is known
        replace(kept(source(), {0: b"a", 1: b"b"}), slots=(0, 0)),
        replace(kept(source(), {0: b"a", 1: b"b"}), names=(b"a",)),
        replace(kept(source(), {0: b"a", 1: b"b"}), tags=(bytes(TAG_BYTES),)),
        replace(kept(source(), {0: b"a"}), tags=(b"short",)),
    ],
)
def test_of_a_message_that_cannot_be_nothing_is_believed(
    store: StoredReplicas, message: KvReplicasStored
) -> None:
    store.give(request(source()), NOW)
    store.keep(kept(source(), {2: b"known"}))
    with pytest.raises(ValueError, match=r"slot|written|tag"):
        store.keep(message)
    assert store.find(b"a") is None
    assert store.find(b"known") is not None


def test_a_slot_is_known_anew_under_its_next_name(store: StoredReplicas) -> None:
    region = store.give(request(source()), NOW)
    store.keep(kept(source(), {0: b"a"}))
    store.drop(drop(source(), 0))
    write(region, 0, 5)
    store.keep(kept(source(), {0: b"b"}, value=5))
    assert store.find(b"a") is None
    assert value_of(store, b"b") == 5


def test_the_blocks_of_a_source_outlive_its_record_for_a_while(
    store: StoredReplicas, engine: ScriptedEngine
) -> None:
    region = store.give(request(source()), NOW)
    store.keep(kept(source(), {0: b"a"}))
    store.on_member_gone(source(), NOW)
    store.sweep(NOW + RETENTION_S - 1)
    assert store.find(b"a") is not None
    forgotten_at = NOW + RETENTION_S
    store.sweep(forgotten_at)
    assert store.find(b"a") is None
    store.sweep(forgotten_at + QUARANTINE_S - 1)
    assert engine.registered == {region.address}
    store.sweep(forgotten_at + QUARANTINE_S)
    assert not engine.registered


def test_a_record_that_comes_back_keeps_its_blocks(store: StoredReplicas) -> None:
    store.give(request(source()), NOW)
    store.keep(kept(source(), {0: b"a"}))
    store.on_member_gone(source(), NOW)
    store.on_member_present(source())
    store.sweep(NOW + RETENTION_S + 1)
    assert store.find(b"a") is not None


def test_a_source_that_has_no_record_is_not_kept_for_ever(store: StoredReplicas) -> None:
    stranger = source(3)
    store.give(request(stranger, 1), NOW)
    store.give(request(stranger, 2), NOW + 50)
    store.keep(kept(stranger, {0: b"a"}, generation=2))
    store.sweep(NOW + RETENTION_S)
    assert store.find(b"a") is None


def test_the_blocks_of_a_dead_incarnation_stay_when_the_next_one_asks(
    store: StoredReplicas,
) -> None:
    store.give(request(source(1, 1)), NOW)
    store.keep(kept(source(1, 1), {0: b"a"}))
    store.on_member_gone(source(1, 1), NOW)
    store.on_member_present(source(1, 2))
    assert store.give(request(source(1, 2)), NOW + 1).num_slots == NUM_SLOTS
    assert store.find(b"a") is not None
    store.keep(kept(source(1, 2), {0: b"b"}))
    store.sweep(NOW + RETENTION_S)
    assert store.find(b"a") is None
    assert store.find(b"b") is not None
