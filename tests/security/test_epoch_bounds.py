"""No message makes a rank believe in a map that etcd has not shown it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from gpu_worker.engine.engine_client import (
    WAKE_STEPS_AHEAD_MAX,
    EngineCallbacks,
    EngineClient,
    believable_wake,
)
from gpu_worker.engine.mailbox import Waiter
from gpu_worker.engine.no_kv_replication import NoKvReplication
from gpu_worker.engine.step_runner import ModelRunner, RunnerParts
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks
from gpu_worker.exchange.interface import StepMonitor
from shared.clock import SystemClock
from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId, Step
from shared.wire import GraphBarrierUpdate, Wake
from tests.support.gateway_harness import toy_map
from tests.support.local_exchange import LocalHub
from tests.unit.gpu_worker.engine.toy import HIDDEN, ToyModel, scheduler

ME = Member(rank=RankId(0), incarnation=Incarnation(1))
PEER = Member(rank=RankId(1), incarnation=Incarnation(1))
FORGED = Epoch(1 << 40)


class CountingHost:
    """Implements `EngineExecutor` and its Waiter: counts what reaches the engine."""

    def __init__(self) -> None:
        self.num_notified = 0

    @property
    def waiter(self) -> Waiter:
        return self

    def cpu_s(self) -> float:
        return 0.0

    def start(self, run: Any) -> Any:
        raise NotImplementedError

    def wait(self, timeout_s: float) -> None: ...

    def notify(self) -> None:
        self.num_notified += 1


@dataclass
class Barrier:
    """In place of a card's: what the driver of its barrier is told, in order."""

    told: list[object] = field(default_factory=list)

    def on_update(self, update: GraphBarrierUpdate) -> None:
        self.told.append(update)

    def on_map(self, expert_map: ExpertMap) -> None:
        self.told.append(expert_map.epoch)

    def declare_dead(self, dead: Member, epoch: Epoch) -> None:
        self.told.append(dead)


def client(host: CountingHost, barrier: Barrier | None = None) -> EngineClient:
    clock = SystemClock()
    hub = LocalHub(num_ranks=2, hidden_size=HIDDEN, top_k=1)

    def make_runner(monitor: StepMonitor, _: GraphBarrierCallbacks) -> RunnerParts:
        runner = ModelRunner(ToyModel(), hub.exchange(ME, monitor, clock, 1e9))
        return RunnerParts(runner, barrier)  # type: ignore[arg-type]

    def unused(*_: object) -> None:
        raise NotImplementedError

    return EngineClient(
        member=ME,
        executor=host,
        make_runner=make_runner,
        scheduler=scheduler(),
        replicator=NoKvReplication(),
        clock=clock,
        callbacks=EngineCallbacks(
            send_tokens=unused,
            send_wake=unused,
            send_update=unused,
            suspect=unused,
            adopted=unused,
            held=unused,
            stopped=unused,
        ),
    )


def map_of(epoch: int) -> ExpertMap:
    return toy_map(epoch, (ME, PEER))


def wake(epoch: int, step: int) -> Wake:
    return Wake(rank=PEER.rank, incarnation=PEER.incarnation, epoch=Epoch(epoch), step=Step(step))


def update(**epochs: int) -> GraphBarrierUpdate:
    fields: dict[str, Any] = dict.fromkeys(("joining", "paused", "entered", "invalidated"), 0)
    return GraphBarrierUpdate(
        member=PEER, limit=0, sleep_at=-1, slept_at=-1, launched=0, **{**fields, **epochs}
    )


FAR = 1 << 40
FARTHEST = 100 + WAKE_STEPS_AHEAD_MAX


@pytest.mark.parametrize(
    ("said", "believed"),
    [
        (wake(FORGED, 0), None),
        (wake(4, 0), None),
        (wake(3, FAR), wake(3, FARTHEST)),
        (wake(0, FAR), wake(0, FARTHEST)),
        (wake(2, FAR), wake(2, WAKE_STEPS_AHEAD_MAX)),
        (wake(3, 101), wake(3, 101)),
        (wake(0, 99), wake(0, 99)),
    ],
)
def test_a_wake_counts_in_a_known_map_for_a_step_that_can_be_near(
    said: Wake, believed: Wake | None
) -> None:
    assert believable_wake(said, Epoch(3), Epoch(3), Step(100)) == believed


async def test_a_wake_for_an_unknown_map_does_not_reach_the_engine() -> None:
    host = CountingHost()
    engine = client(host)
    engine.announce_map(map_of(3))
    before = host.num_notified
    engine.wake(wake(FORGED, 0))
    assert host.num_notified == before
    engine.wake(wake(3, 0))
    assert host.num_notified > before


@pytest.mark.parametrize("name", ["joining", "paused", "entered", "invalidated"])
async def test_an_update_that_names_an_unknown_map_waits_until_etcd_shows_it(name: str) -> None:
    barrier = Barrier()
    engine = client(CountingHost(), barrier)
    engine.announce_map(map_of(3))
    engine.on_graph_update(update(**{name: 4}))
    assert barrier.told == [3]
    engine.announce_map(map_of(4))
    assert barrier.told == [3, 4, update(**{name: 4})]


async def test_updates_that_wait_take_the_place_of_one() -> None:
    barrier = Barrier()
    engine = client(CountingHost(), barrier)
    for epoch in range(100, 1100):
        engine.on_graph_update(update(joining=epoch))
    engine.on_graph_update(update(joining=FORGED))
    assert barrier.told == []
    engine.on_graph_update(update())  # a newer one, which names nothing unknown
    engine.announce_map(map_of(2000))
    assert barrier.told == [update(), 2000]


async def test_a_verdict_makes_the_map_that_follows_it_known() -> None:
    barrier = Barrier()
    engine = client(CountingHost(), barrier)
    engine.announce_map(map_of(3))
    engine.on_graph_update(update(invalidated=4))
    engine.declare_dead(Member(rank=RankId(2), incarnation=Incarnation(1)), Epoch(5))
    assert barrier.told[-1] == update(invalidated=4)
