"""The mask of a process's next incarnation: nothing of the former one runs or waits by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from gpu_worker.cuda.ep.handles import HandleStore
from gpu_worker.cuda.ep.members import MaskChange
from gpu_worker.cuda.ep.rank_mask import RankMask
from gpu_worker.exchange.worker_thread import WorkerThread
from shared.clock import SystemClock
from shared.errors import DeviceLost
from shared.expert_map import ExpertMap
from shared.records import ExchangeHandles
from shared.types import Epoch, Incarnation, Member, RankId

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
    buffer_id="of no rank",
)


class Device:
    """Implements `rank_mask.MaskDevice` and `mappings.MappedBuffer`. Kernels run until the mask is
    clear."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.active: set[RankId] = {RankId(0)}
        self.mapped: list[int] = []
        self.is_lost = False

    def clear(self, ranks: Sequence[RankId]) -> None:
        self._check()
        self.calls.append("clear")
        self.active -= set(ranks)

    def skip_experts(self) -> None:
        self._check()
        self.calls.append("skip")

    def set(self, change: MaskChange) -> None:
        self._check()
        self.calls.append("set")
        self.active = set(change.active)

    def drain(self) -> None:
        self._check()
        assert self.active == {0}, "kernels wait for others"
        self.calls.append("drain")

    def check(self) -> None:
        self._check()

    def connect_ranks(self, remote_ranks: list[int], activate: bool = True) -> None:
        self.mapped += remote_ranks

    def disconnect_ranks(self, remote_ranks: list[int]) -> None:
        self.mapped = [rank for rank in self.mapped if rank not in remote_ranks]
        self.calls.append("unmap")

    def _check(self) -> None:
        if self.is_lost:
            raise RuntimeError("the context is gone")


def life(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def map_of(epoch: int, *members: Member) -> ExpertMap:
    placement = np.zeros((1, 3, 1), dtype=np.int16)
    return ExpertMap(epoch=Epoch(epoch), num_experts=1, members=members, placement=placement)


def connect(mask: RankMask, peer: Member) -> None:
    mask.connect(peer, replace(HANDLES, buffer_id=str(peer)))


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def mask(device: Device) -> RankMask:
    """Of rank 0, in a map with ranks 1 and 2."""
    mask = RankMask(
        life(0),
        device=device,
        buffer=device,
        handle_store=HandleStore(),
        clock=SystemClock(),
        mapping_worker=WorkerThread("mappings"),
    )
    for rank in (1, 2):
        connect(mask, life(rank))
    mask.adopt(map_of(1, life(0), life(1), life(2)))
    device.calls.clear()
    return mask


def test_nothing_of_the_former_incarnation_runs_when_the_next_one_begins(
    mask: RankMask, device: Device
) -> None:
    assert device.active == {0, 1, 2}
    mask.end()
    mask.renew(life(0, 2))
    assert device.calls == ["clear", "drain", "set"]
    assert device.active == {0}


def test_an_ended_incarnation_waits_for_nobody_whatever_its_threads_still_do(
    mask: RankMask, device: Device
) -> None:
    mask.end()
    renewed = mask.renew(life(0, 2))
    connect(renewed, life(1))
    renewed.adopt(map_of(3, life(0, 2), life(1)))
    assert device.active == {0, 1}
    mask.release([life(1)], Epoch(4))
    assert device.active == {0, 1}
    with pytest.raises(ConnectionError, match="over"):
        connect(mask, life(2, 2))


def test_an_engine_that_adopts_a_map_too_late_waits_for_nobody(
    mask: RankMask, device: Device
) -> None:
    mask.end()
    mask.adopt(map_of(2, life(0), life(1), life(2)))
    assert device.active == {0}


def test_peers_that_are_mapped_are_met_again_without_mapping(
    mask: RankMask, device: Device
) -> None:
    mask.end()
    renewed = mask.renew(life(0, 2))
    assert not renewed.is_connected(life(1))
    connect(renewed, life(1))
    connect(renewed, life(2, 2))
    assert sorted(device.mapped) == [1, 2]
    assert device.calls.count("unmap") == 1  # of the one that is a new process
    assert renewed.is_connected(life(1))
    assert renewed.is_connected(life(2, 2))


def test_a_card_that_is_lost_has_no_next_incarnation(mask: RankMask, device: Device) -> None:
    device.is_lost = True
    with pytest.raises(DeviceLost, match="context"):
        mask.end()
    with pytest.raises(DeviceLost, match="context"):
        mask.renew(life(0, 2))


def test_a_step_that_nobody_will_deliver_skips_its_experts(mask: RankMask, device: Device) -> None:
    mask.release([life(1)], Epoch(2))
    assert device.calls == ["clear", "skip"]


def test_the_death_of_a_newcomer_changes_nothing_for_running_steps(
    mask: RankMask, device: Device
) -> None:
    mask.release([life(2)], Epoch(2))
    mask.adopt(map_of(2, life(0), life(1)))
    connect(mask, life(2, 2))
    device.calls.clear()
    mask.release([life(2, 2)], Epoch(3))
    assert "skip" not in device.calls
    assert device.active == {0, 1}


def test_a_verdict_that_comes_after_its_map_skips_nothing(mask: RankMask, device: Device) -> None:
    mask.adopt(map_of(2, life(0), life(2)))
    device.calls.clear()
    mask.release([life(1)], Epoch(2))
    assert "skip" not in device.calls
