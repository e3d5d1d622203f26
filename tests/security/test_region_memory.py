"""A link that breaks again and again takes a bounded amount of memory, and gets it back."""

from __future__ import annotations

import itertools

import pytest

from gpu_worker.exchange.message import MessageLayout
from gpu_worker.exchange.regions import (
    QUARANTINE_S,
    REGIONS_MAX,
    REGIONS_READ_MAX,
    Quarantine,
    Regions,
)
from gpu_worker.kv_replication.block_form import BlockForm
from gpu_worker.kv_replication.block_tags import BlockTags
from gpu_worker.kv_replication.store import REGIONS_MAX as REPLICA_REGIONS_MAX
from gpu_worker.kv_replication.store import StoredReplicas
from shared.handshake import Access
from shared.types import Incarnation, Member, RankId
from shared.wire import OpenKvReplicaRegion
from tests.support.scripted_engine import ScriptedEngine

LAYOUT = MessageLayout(hidden_size=4, top_k=2, step_tokens_max=4)
PEER = Member(rank=RankId(1), incarnation=Incarnation(1))
OTHER = Member(rank=RankId(2), incarnation=Incarnation(1))
FLAP_S = 0.1


def test_a_flapping_link_has_no_more_than_so_many_exchange_regions() -> None:
    engine, quarantine = ScriptedEngine(), Quarantine()
    regions = Regions(engine, LAYOUT, quarantine)
    refused_at = None
    for generation in itertools.count(1):
        now = generation * FLAP_S
        try:
            newest = regions.give(PEER, generation, now)
        except MemoryError:
            refused_at = now
            break
        assert regions.of(PEER)[0] is newest
        assert len(regions.of(PEER)) <= REGIONS_READ_MAX
    assert refused_at is not None
    assert len(engine.registered) == REGIONS_MAX
    assert regions.give(OTHER, 1, refused_at), "others do not wait for it"
    regions.retire(OTHER, refused_at)

    quarantine.sweep(refused_at + QUARANTINE_S)
    assert len(engine.registered) == REGIONS_READ_MAX
    assert regions.give(PEER, 10_000, refused_at + QUARANTINE_S)


def test_a_flapping_link_has_no_more_than_so_many_replica_regions() -> None:
    engine = ScriptedEngine()
    store = StoredReplicas(
        engine, BlockForm(layout="toy", block_bytes=512), BlockTags(Access("toy")), 2048
    )
    store.on_member_present(PEER)

    def ask(generation: int, now: float) -> None:
        store.give(
            OpenKvReplicaRegion(source=PEER, generation=generation, layout="toy", block_bytes=512),
            now,
        )

    for generation in range(1, REPLICA_REGIONS_MAX + 1):
        ask(generation, generation * FLAP_S)
    for generation in range(REPLICA_REGIONS_MAX + 1, 100):
        with pytest.raises(ValueError, match="wait"):
            ask(generation, generation * FLAP_S)
    assert len(engine.registered) == REPLICA_REGIONS_MAX
    store.sweep(100 * FLAP_S + QUARANTINE_S)
    assert len(engine.registered) == 1
    ask(1000, 100 * FLAP_S + QUARANTINE_S)
