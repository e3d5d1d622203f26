"""Buffers are mapped and unmapped beside running steps only where nothing has to be unmapped."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from gpu_worker.cuda.ep.handles import HandleStore
from gpu_worker.cuda.ep.mappings import EpMappings
from gpu_worker.cuda.ep.members import EpMembers
from gpu_worker.exchange.worker_thread import WorkerThread
from shared.clock import SystemClock
from shared.errors import DeviceLost
from shared.expert_map import ExpertMap
from shared.records import ExchangeHandles
from shared.types import Epoch, Incarnation, Member, RankId


class Card:
    """Implements `ep_mappings.MappedBuffer` as Mooncake does: a rank that is connected has to be
    disconnected before its next life is connected. `dead` cannot be mapped."""

    def __init__(self) -> None:
        self.mapped: set[int] = set()
        self.dead: set[int] = set()
        self.num_unmapped = 0

    def connect_ranks(self, remote_ranks: list[int], activate: bool = True) -> None:
        if self.dead & set(remote_ranks):
            raise RuntimeError("no such memory")
        assert not self.mapped & set(remote_ranks), "already connected"
        self.mapped |= set(remote_ranks)

    def disconnect_ranks(self, remote_ranks: list[int]) -> None:
        assert self.mapped >= set(remote_ranks), "not connected"
        self.mapped -= set(remote_ranks)
        self.num_unmapped += len(remote_ranks)


class Own:
    """Rank 0 of three."""

    def __init__(self) -> None:
        self.card = Card()
        self.who = EpMembers(life(0))
        self.mappings = EpMappings(
            self.who,
            threading.Lock(),
            self.card,
            HandleStore(),
            SystemClock(),
            WorkerThread("mappings"),
            self._check_device,
        )
        self.context_is_gone = False

    def _check_device(self) -> None:
        if self.context_is_gone:
            raise DeviceLost("the context is gone")

    def connect(self, peer: Member) -> None:
        """As a process of its own."""
        self.mappings.connect(peer, handles_of(peer))

    def adopt(self, epoch: int, *members: Member) -> frozenset[RankId]:
        expert_map = ExpertMap(
            epoch=Epoch(epoch),
            num_experts=1,
            members=members,
            placement=np.zeros((1, 3, 1), dtype=np.int16),
        )
        self.mappings.map_members(expert_map).result()
        return self.who.adopt(expert_map).active


HANDLES = ExchangeHandles(
    host="here",
    address=0,
    remote_key=0,
    subnet_prefix=0,
    interface_id=0,
    queue_pairs=(),
    local_ids=(),
    ipc_handle=(),
    step_tokens_max=1,
    buffer_id="one",
)


def handles_of(peer: Member) -> ExchangeHandles:
    return replace(HANDLES, buffer_id=str(peer))


def life(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


@pytest.fixture
def own() -> Own:
    """In a map with rank 1; rank 2 was in the one before."""
    own = Own()
    own.connect(life(1))
    own.connect(life(2))
    assert own.adopt(1, life(0), life(1), life(2)) == {0, 1, 2}
    own.adopt(2, life(0), life(1))
    return own


def test_before_the_first_map_and_where_nobody_was_mapped_a_life_is_mapped_at_once() -> None:
    own = Own()
    own.connect(life(1))
    own.connect(life(1, 2))
    assert (own.card.mapped, own.card.num_unmapped) == ({1}, 1)
    own.adopt(1, life(0), life(1, 2))
    own.connect(life(2))
    assert own.card.mapped == {1, 2}


def test_a_next_life_is_met_beside_steps_and_mapped_when_its_map_is_adopted(own: Own) -> None:
    own.connect(life(2, 2))
    assert own.who.is_connected(life(2, 2))
    assert own.card.num_unmapped == 0
    assert own.adopt(3, life(0), life(1), life(2, 2)) == {0, 1, 2}
    assert (own.card.mapped, own.card.num_unmapped) == ({1, 2}, 1)


def test_maps_without_the_next_life_leave_the_former_one_mapped(own: Own) -> None:
    own.connect(life(2, 2))
    own.adopt(3, life(0), life(1))
    assert own.card.num_unmapped == 0


def test_a_newcomer_that_has_just_died_stays_masked_and_its_next_life_is_let_in(own: Own) -> None:
    own.connect(life(2, 2))
    own.card.dead = {2}
    assert own.adopt(3, life(0), life(1), life(2, 2)) == {0, 1}
    assert own.who.lost_ranks([1, 1, 0]) == [2]
    assert not own.who.is_connected(life(2, 2))
    own.card.dead = set()
    with pytest.raises(ConnectionError, match="member"):
        own.connect(life(2, 3))
    own.adopt(4, life(0), life(1))
    own.connect(life(2, 3))
    assert own.adopt(5, life(0), life(1), life(2, 3)) == {0, 1, 2}


def test_who_cannot_be_mapped_at_once_is_not_met() -> None:
    own = Own()
    own.card.dead = {1}
    with pytest.raises(ConnectionError, match="no such memory"):
        own.connect(life(1))
    assert not own.who.is_connected(life(1))


def test_a_failure_of_the_own_card_is_not_taken_for_the_peers() -> None:
    own = Own()
    own.card.dead = {1}
    own.context_is_gone = True
    with pytest.raises(DeviceLost, match="context"):
        own.connect(life(1))
    own.context_is_gone = False
    own.card.dead = set()
    own.connect(life(1))
    own.connect(life(2))
    own.adopt(1, life(0), life(1))
    own.connect(life(2, 2))
    own.card.dead = {2}
    own.context_is_gone = True
    with pytest.raises(DeviceLost, match="context"):
        own.adopt(2, life(0), life(1), life(2, 2))
    assert own.who.is_connected(life(2, 2))


def test_who_comes_back_in_its_process_is_mapped_already(own: Own) -> None:
    own.mappings.connect(life(2, 2), handles_of(life(2)))
    assert own.adopt(3, life(0), life(1), life(2, 2)) == {0, 1, 2}
    assert own.card.num_unmapped == 0


def test_the_buffer_that_was_only_met_is_not_taken_for_the_one_that_is_mapped(own: Own) -> None:
    own.connect(life(2, 2))
    own.mappings.connect(life(2, 3), handles_of(life(2, 2)))
    assert own.adopt(3, life(0), life(1), life(2, 3)) == {0, 1, 2}
    assert own.card.num_unmapped == 1
