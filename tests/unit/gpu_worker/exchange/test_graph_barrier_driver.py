"""Ranks whose graphs wait for nobody, as those of a dense model, adopt maps and sleep by
themselves: they tell their peers nothing, and need no word of theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable

import numpy as np
import pytest

from gpu_worker.exchange.graph_barrier import IDLE_GRAPHS, SLEEP_AHEAD
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks, GraphBarrierDriver
from gpu_worker.exchange.worker_thread import WorkerThread
from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId, Step
from shared.wire import GraphBarrierUpdate

OWN, PEER, LATER = (Member(rank=RankId(n), incarnation=Incarnation(1)) for n in range(3))


class Told:
    def __init__(self) -> None:
        self.updates: list[Member] = []
        self.wakes: list[Step] = []
        self.undeliverable: list[Epoch] = []
        self.released: list[Member] = []

    def send_update(self, update: GraphBarrierUpdate, peers: Iterable[Member]) -> None:
        self.updates += peers

    def release(self, members: Collection[Member], epoch: Epoch) -> None:
        self.released += members


def driver_of(told: Told, *, meets_peers: bool) -> GraphBarrierDriver:
    callbacks = GraphBarrierCallbacks(
        send_update=told.send_update,
        wake=told.wakes.append,
        notify_engine=lambda: None,
        on_undeliverable=told.undeliverable.append,
        on_failed=pytest.fail,
    )
    loop = asyncio.get_running_loop()
    return GraphBarrierDriver(
        OWN, told.release, loop, WorkerThread("release"), callbacks, meets_peers=meets_peers
    )


def map_of(epoch: int, *members: Member, joiners: tuple[Member, ...] = ()) -> ExpertMap:
    return ExpertMap(
        epoch=Epoch(epoch),
        num_experts=1,
        members=members,
        placement=np.zeros((1, 3, 1), dtype=np.int16),
        joiners=tuple(m.rank for m in joiners),
    )


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def adopt(driver: GraphBarrierDriver, expert_map: ExpertMap) -> bool:
    driver.on_map(expert_map)
    if driver.claim_launch_before(expert_map) or not driver.prepare_adoption(expert_map):
        return False
    driver.adopt(expert_map, lambda: None)
    return True


async def test_with_peers_a_map_with_joiners_waits_for_their_word() -> None:
    told = Told()
    driver = driver_of(told, meets_peers=True)
    assert not adopt(driver, map_of(1, OWN, PEER, joiners=(OWN, PEER)))
    await settle()
    assert told.updates


async def test_alone_every_map_is_adopted_at_once_and_nobody_is_told() -> None:
    told = Told()
    driver = driver_of(told, meets_peers=False)
    first, second = map_of(1, OWN, PEER, joiners=(OWN, PEER)), map_of(2, OWN, PEER, LATER)
    assert adopt(driver, first)
    assert driver.peers_met(first) == ()
    assert driver.claim()
    driver.on_graph_done()
    driver.declare_dead(PEER, Epoch(2))
    driver.notify_when_undeliverable(Epoch(1))
    assert adopt(driver, second)
    assert driver.claim()
    driver.on_graph_done()
    assert adopt(driver, map_of(3, OWN, LATER, joiners=(LATER,)))
    await settle()
    assert not told.updates
    assert not told.released
    assert told.undeliverable == [1]
    assert not driver.awaited()


async def test_alone_a_rank_without_work_sleeps_without_a_peers_promise() -> None:
    told = Told()
    driver = driver_of(told, meets_peers=False)
    assert adopt(driver, map_of(1, OWN, PEER))
    for graph in range(1, IDLE_GRAPHS + SLEEP_AHEAD + 1):
        assert driver.claim()
        driver.on_graph_done()
        asleep = driver.commit(had_work=False)
        assert asleep == (graph == IDLE_GRAPHS + SLEEP_AHEAD)
    await settle()
    assert not told.wakes
