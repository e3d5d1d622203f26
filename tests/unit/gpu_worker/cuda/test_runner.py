"""Engines over graphs that meet by counting: real runners, barrier drivers and engines in threads;
in place of the cards a device whose graphs wait for each other as Mooncake's kernels do."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpu_worker.cuda.ep.members import EpMembers
from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.mailbox import (
    Adopted,
    Arrival,
    EngineEvent,
    Inbox,
    NewMap,
    SendWake,
    StepTokens,
    Stop,
    Suspect,
    ThreadWaiter,
)
from gpu_worker.engine.monitor import EngineMonitor
from gpu_worker.engine.step_batch import StepBatch
from gpu_worker.exchange.graph_barrier import GraphBarrier
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks, GraphBarrierDriver
from gpu_worker.exchange.replica_policy import ReplicaPolicy
from gpu_worker.exchange.worker_thread import WorkerThread
from shared.clock import SystemClock
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId, Step
from shared.wire import GraphBarrierUpdate, Wake
from tests.support.fake_clock import FakeClock
from tests.unit.gpu_worker.engine.toy import ToyModel, alone, origin, scheduler, submit

PATIENCE_S = 20
NUM_RANKS = 3
LOOKS = 10


class Death(BaseException):
    pass


class Fabric:
    """Counts, for each pair, the graphs that one has launched towards the other, and those that the
    other has taken. A graph takes from whom its mask lets it wait for; from the rest it wipes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.graph_ended = threading.Condition(self.lock)
        self.devices: list[Device] = []
        self.sent: dict[tuple[Member, Member], int] = {}
        self.taken: dict[tuple[Member, Member], int] = {}

    def wait_until_still(self) -> None:
        """As unmapping does, where ranks share a card. Called with the lock held."""
        is_still = self.graph_ended.wait_for(
            lambda: not any(d.queue for d in self.devices if not d.dies.is_set()), PATIENCE_S
        )
        assert is_still, "graphs wait for one that maps joiners"


class Device:
    """Implements `runner.GraphDecoder` and what the runner asks of an exchange."""

    def __init__(self, own: Member, fabric: Fabric) -> None:
        self.own = own
        self.fabric = fabric
        self.who = EpMembers(own)
        self.mask_R = np.zeros(NUM_RANKS, dtype=np.int32)
        self.mask_R[own.rank] = 1
        self.member_of_rank: dict[int, Member] = {}
        self.model = ToyModel()
        self.num_launched = self.num_ahead = 0
        self.queue: deque[Graph] = deque()  # launched and not ended; the first one runs
        self.former_ids: list[int] = []
        self.dies = threading.Event()
        self.on_launch: Callable[[int], None] = lambda num_launched: None
        self.num_unmapped = 0
        fabric.devices.append(self)

    def mark_connected(self, peers: Iterable[Member]) -> None:
        with self.fabric.lock:
            for peer in peers:
                if peer != self.own and not self.who.is_connected(peer):
                    at_once = self.who.may_map(peer.rank)
                    self.who.mark_connected(peer)
                    if at_once:
                        self.map(peer)

    def map(self, peer: Member) -> None:
        if former := self.who.mapped([peer.rank]):
            self.fabric.wait_until_still()
            self.who.note_unmapped(former)
            self.num_unmapped += 1
        self.who.note_mapped(peer)
        self.member_of_rank[peer.rank] = peer

    def map_members(self, expert_map: ExpertMap) -> Future[None]:
        with self.fabric.lock:
            for peer in self.who.members_to_map(expert_map):
                self.map(peer)
        mapped: Future[None] = Future()
        mapped.set_result(None)
        return mapped

    def adopt(self, expert_map: ExpertMap) -> None:
        with self.fabric.lock:
            change = self.who.adopt(expert_map)
            self.mask_R[:] = 0
            self.mask_R[sorted(change.active)] = 1

    def release(self, dead: Iterable[Member], epoch: Epoch) -> None:
        with self.fabric.lock:
            for rank in self.who.give_up(list(dead), epoch):
                self.mask_R[rank] = 0

    def isolate(self) -> None:
        with self.fabric.lock:
            self.who.isolate()
            self.mask_R[:] = 0
            self.mask_R[self.own.rank] = 1

    def lost_members(self, mask_R: NDArray[np.int32]) -> list[Member]:
        with self.fabric.lock:
            return self.who.lost_unexplained(mask_R)

    def check_step(self, mask_R: NDArray[np.int32]) -> None:
        with self.fabric.lock:
            if lost := self.who.lost_ranks(mask_R):
                raise StepAbandoned(f"ranks {lost} left")

    def use_slots(self, slot_of_LUE: NDArray[np.int32]) -> None: ...

    def launch(self, batch: StepBatch, draws: object = ()) -> Graph:
        self.on_launch(self.num_launched)
        if self.dies.is_set():
            raise Death
        self.num_launched += 1
        graph = Graph(self, batch)
        with self.fabric.lock:
            self.queue.append(graph)
            self.num_ahead += len(self.queue) > 1
            if graph is self.queue[0]:
                self.start(graph)
        return graph

    def start(self, graph: Graph) -> None:
        """Once the graph before it has ended."""
        for rank, peer in self.member_of_rank.items():
            if self.mask_R[rank]:
                pair = (self.own, peer)
                self.fabric.sent[pair] = self.fabric.sent.get(pair, 0) + 1
        batch = graph.batch
        ids = [t if t >= 0 else self.former_ids[-1 - t] for t in batch.token_ids_T.tolist()]
        self.model.write(replace(batch, token_ids_T=np.array(ids, dtype=np.int32)))
        graph.logits_RV = torch.from_numpy(self.model.logits(batch))
        self.former_ids = graph.logits_RV.numpy().argmax(axis=1).tolist()

    def end(self, graph: Graph) -> None:
        assert self.queue.popleft() is graph
        self.fabric.graph_ended.notify_all()
        if any(not self.mask_R[m.rank] for m in self.who.members):
            self.former_ids = [0] * len(self.former_ids)  # what lacks somebody is rubbish
        if self.queue:
            self.start(self.queue[0])


class Graph:
    """Implements `runner.LaunchedStep`."""

    def __init__(self, device: Device, batch: StepBatch) -> None:
        self._device = device
        self._ended = False
        self._mask_R = device.mask_R.copy()
        self.batch = batch
        self.logits_RV = torch.zeros(0)

    def is_done(self) -> bool:
        device = self._device
        if device.dies.is_set():
            raise Death
        fabric = device.fabric
        with fabric.lock:
            if self._ended:
                return True
            if device.queue[0] is not self:
                return False
            pairs = {r: (peer, device.own) for r, peer in device.member_of_rank.items()}
            awaited = [p for r, p in pairs.items() if device.mask_R[r]]
            if any(fabric.sent.get(p, 0) <= fabric.taken.get(p, 0) for p in awaited):
                return False
            for rank, pair in pairs.items():
                taken = fabric.taken.get(pair, 0)
                is_awaited = bool(device.mask_R[rank])
                fabric.taken[pair] = taken + 1 if is_awaited else fabric.sent.get(pair, 0)
            self._mask_R = device.mask_R.copy()
            self._ended = True
            device.end(self)
            return True

    def ids(self) -> NDArray[np.int32]:
        return self.logits_RV.numpy().argmax(axis=1).astype(np.int32)

    def mask(self) -> NDArray[np.int32]:
        return self._mask_R


class OneRank:
    def __init__(self, member: Member, cluster: Cluster) -> None:
        self.member = member
        self.device = Device(member, cluster.fabric)
        self.waiter = ThreadWaiter()
        self.inbox = Inbox(self.waiter)
        self.events: queue.Queue[EngineEvent] = queue.Queue()
        self.loop = asyncio.get_running_loop()
        self.left = False
        clock = SystemClock()
        self.monitor = EngineMonitor(self.inbox, self.post, clock)
        self.cluster = cluster
        self.held: asyncio.Queue[Epoch] = asyncio.Queue()
        self.barrier_driver = GraphBarrierDriver(
            member,
            self.device.release,
            self.loop,
            WorkerThread("release"),
            GraphBarrierCallbacks(
                send_update=self._tell,
                wake=lambda step: cluster.wake(member, Epoch(0), step),
                notify_engine=self.inbox.notify,
                on_undeliverable=self.held.put_nowait,
                on_failed=self._leave,
            ),
        )
        self.engine = Engine(
            member=member,
            runner=CudaRunner(
                member=member,
                decoder=self.device,
                mask=self.device,
                barrier_driver=self.barrier_driver,
                monitor=self.monitor,
                clock=clock,
                deadline_ms=1e9,
                replicas=ReplicaPolicy.SPREAD,
                pause=lambda: time.sleep(20e-6),
            ),
            scheduler=scheduler(),
            inbox=self.inbox,
            monitor=self.monitor,
            post=self.post,
            clock=clock,
        )
        self.died = asyncio.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def is_asleep(self) -> bool:
        """With nothing to wake up for."""
        is_woken = bool(self.inbox._items) or self.waiter._event.is_set()
        return not is_woken and self.monitor._parked

    def post(self, event: EngineEvent) -> None:
        self.events.put(event)
        if isinstance(event, SendWake):
            self.loop.call_soon_threadsafe(self.cluster.wake, self.member, event.epoch, event.step)

    def deliver_map(self, expert_map: ExpertMap) -> None:
        self.device.mark_connected(expert_map.members)
        self.barrier_driver.on_map(expert_map)
        self.inbox.put(NewMap(expert_map=expert_map, seen_at=0.0))

    async def event(self, kind: type[EngineEvent]) -> EngineEvent:
        while True:
            event = await asyncio.to_thread(self.events.get, True, PATIENCE_S)
            if isinstance(event, kind):
                return event

    async def tokens(self, count: int, known: tuple[int, ...] = ()) -> list[int]:
        """Of its one session, from the first, of which the `known` were read already."""
        ids = [*known]
        while len(ids) < count:
            event = await self.event(StepTokens)
            assert isinstance(event, StepTokens)
            for sessions in event.sessions.values():
                for each in sessions:
                    assert each.index == len(ids)
                    ids += each.ids
        return ids

    def _tell(self, update: GraphBarrierUpdate, peers: Iterable[Member]) -> None:
        for peer in peers:
            rank = self.cluster.ranks.get(peer)
            if rank is not None:
                self.loop.call_soon(rank.barrier_driver.on_update, update)

    def _leave(self, reason: str) -> None:
        self.left = True

    def _run(self) -> None:
        try:
            self.engine.run()
        except Death:
            self.loop.call_soon_threadsafe(self.died.set)


class Cluster:
    """What etcd, links and the control plane do."""

    def __init__(self) -> None:
        self.fabric = Fabric()
        self.ranks: dict[Member, OneRank] = {}
        self.epoch = 0

    def start(self, rank: int, incarnation: int = 1) -> OneRank:
        member = Member(rank=RankId(rank), incarnation=Incarnation(incarnation))
        self.ranks[member] = OneRank(member, self)
        return self.ranks[member]

    def publish(self, joiners: Iterable[OneRank] = ()) -> None:
        self.epoch += 1
        members = tuple(sorted(self.ranks))
        placement = np.full((1, NUM_RANKS, 1), -1, dtype=np.int16)
        placement[0, [m.rank for m in members]] = 0
        expert_map = ExpertMap(
            epoch=Epoch(self.epoch),
            num_experts=1,
            members=members,
            placement=placement,
            joiners=tuple(sorted(r.member.rank for r in joiners)),
        )
        for rank in self.ranks.values():
            rank.deliver_map(expert_map)

    def exclude(self, dead: OneRank) -> None:
        """The verdict, then the map; its kernels are gone."""
        del self.ranks[dead.member]
        for rank in self.ranks.values():
            rank.barrier_driver.declare_dead(dead.member, Epoch(self.epoch + 1))
        self.publish()

    def wake(self, by: Member, epoch: Epoch, step: Step) -> None:
        for member, rank in self.ranks.items():
            if member != by:
                rank.inbox.put(
                    Wake(rank=by.rank, incarnation=by.incarnation, epoch=epoch, step=step)
                )

    async def settles(self) -> None:
        """Until all have adopted the newest map: the control plane lets nobody join before."""
        while True:
            if all(r.engine.snapshot().epoch == self.epoch for r in self.ranks.values()):
                return
            await asyncio.sleep(0.002)

    async def sleeps(self) -> int:
        """Until no device launches anything any more; how many graphs they have launched. What one
        thread tells another may be on its way while both sleep, hence several looks."""
        looks, before = 0, -1
        while looks < LOOKS:
            now = sum(rank.device.num_launched for rank in self.ranks.values())
            is_still = now == before and all(rank.is_asleep() for rank in self.ranks.values())
            looks, before = looks + 1 if is_still else 0, now
            await asyncio.sleep(0.002)
        return before


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    one = Cluster()
    everybody = [one.start(rank) for rank in range(NUM_RANKS)]
    one.publish(everybody)
    started = dict(one.ranks)
    await one.settles()
    yield one
    started |= one.ranks
    for rank in started.values():
        rank.inbox.put(Stop())
        rank.device.dies.set()
    for rank in started.values():
        await asyncio.to_thread(rank.thread.join, PATIENCE_S)
        assert not rank.thread.is_alive()


def give(rank: OneRank, name: str, prompt: tuple[int, ...], count: int) -> list[int]:
    """What it will answer."""
    request = submit(name, prompt, max_tokens=count)
    assert rank.inbox.put(Arrival(origin=origin(), submit=request))
    return alone(prompt, request.sampling)[0]


async def test_streams_are_those_of_a_lone_run_and_all_sleep_between_them(cluster: Cluster) -> None:
    ranks = list(cluster.ranks.values())
    for turn in range(2):
        wanted = [give(r, f"{turn}", (3, 4, 5 + i + turn), 20) for i, r in enumerate(ranks[:2])]
        got = await asyncio.gather(*(r.tokens(20) for r in ranks[:2]))
        assert got == wanted
        asleep = await cluster.sleeps()
        assert await cluster.sleeps() == asleep


async def test_a_step_whose_logits_the_host_reads_has_none_behind_it(cluster: Cluster) -> None:
    one = next(iter(cluster.ranks.values()))
    request = submit("p", (3, 4), max_tokens=12, logprobs=1)
    assert one.inbox.put(Arrival(origin=origin(), submit=request))
    assert await one.tokens(12) == alone((3, 4), request.sampling)[0]
    assert one.device.num_ahead <= 1, "but for its first step, behind one without work"


async def test_while_a_peers_link_is_broken_no_step_is_launched_behind_another(
    cluster: Cluster,
) -> None:
    """The link breaks in the middle of the stream, and is whole again before its end."""
    one, two, _ = cluster.ranks.values()
    await cluster.sleeps()
    first = one.device.num_launched
    num_ahead: list[int] = []

    def break_and_mend_the_link(num_launched: int) -> None:
        if num_launched - first in (10, 40):
            for rank in cluster.ranks.values():
                rank.inbox.may_run_ahead = num_launched - first == 40
        if num_launched - first in (15, 40):
            num_ahead.append(one.device.num_ahead)

    one.device.on_launch = break_and_mend_the_link
    wanted = give(one, "a", (3, 4), 60)
    assert await one.tokens(60) == wanted
    broken, mended = num_ahead
    assert 0 < broken == mended < one.device.num_ahead
    assert two.device.num_ahead == 0, "it has no work of its own to plan ahead"


async def test_a_death_in_mid_stream_and_a_restart(cluster: Cluster) -> None:
    one, two, dead = cluster.ranks.values()
    await cluster.sleeps()
    first = dead.device.num_launched

    def die_in_mid_stream(num_launched: int) -> None:
        if num_launched - first == 15:
            dead.device.dies.set()

    dead.device.on_launch = die_in_mid_stream
    wanted = [give(one, "a", (3, 4), 50), give(two, "b", (5, 6, 7), 50)]
    give(dead, "c", (8,), 50)
    begun = [await one.tokens(5), await two.tokens(5)]
    await asyncio.wait_for(dead.died.wait(), PATIENCE_S)
    cluster.exclude(dead)
    assert await one.tokens(50, tuple(begun[0])) == wanted[0]
    assert one.device.num_ahead > 10, "steps are to be launched behind each other"
    assert await two.tokens(50, tuple(begun[1])) == wanted[1]
    joiner = cluster.start(2, incarnation=2)
    cluster.publish([joiner])
    await joiner.event(Adopted)
    expected = give(joiner, "d", (9, 9), 9)
    assert await joiner.tokens(9) == expected
    await cluster.sleeps()


async def test_a_join_while_streams_run_and_while_all_sleep(cluster: Cluster) -> None:
    for incarnation in (2, 3):
        one, two, dead = (cluster.ranks[m] for m in sorted(cluster.ranks))
        dead.device.dies.set()
        dead.inbox.put(Stop())
        await asyncio.to_thread(dead.thread.join, PATIENCE_S)
        cluster.exclude(dead)
        await cluster.settles()
        if incarnation == 3:
            await cluster.sleeps()
        wanted = give(one, f"s{incarnation}", (3, 7), 50) if incarnation == 2 else []
        joiner = cluster.start(2, incarnation)
        cluster.publish([joiner])
        await joiner.event(Adopted)
        assert await one.tokens(len(wanted)) == wanted
        expected = give(two, f"t{incarnation}", (9, 2), 9)
        assert await two.tokens(9) == expected
        assert one.device.num_unmapped == two.device.num_unmapped == incarnation - 1


async def test_a_slot_is_free_once_everybody_has_let_go(cluster: Cluster) -> None:
    one, two, dead = cluster.ranks.values()
    await one.event(Adopted)
    await two.event(Adopted)
    dead.device.dies.set()
    one.barrier_driver.notify_when_undeliverable(Epoch(1))
    one.barrier_driver.declare_dead(dead.member, Epoch(2))
    await asyncio.sleep(0)
    assert one.held.empty()
    two.barrier_driver.declare_dead(dead.member, Epoch(2))
    assert await asyncio.wait_for(one.held.get(), PATIENCE_S) == Epoch(1)


async def test_who_hangs_in_the_pause_of_a_join_is_suspected_once() -> None:
    clock, events = FakeClock(), list[EngineEvent]()
    inbox = Inbox(ThreadWaiter())
    own, hung, newcomer = (
        Member(rank=RankId(r), incarnation=Incarnation(9)) for r in range(NUM_RANKS)
    )
    barrier_driver = GraphBarrierDriver(
        own,
        lambda *_: None,
        asyncio.get_running_loop(),
        WorkerThread("release"),
        GraphBarrierCallbacks(
            send_update=lambda *_: None,
            wake=lambda _: None,
            notify_engine=inbox.notify,
            on_undeliverable=lambda _: None,
            on_failed=lambda _: None,
        ),
    )
    runner = CudaRunner(
        member=own,
        decoder=Device(own, Fabric()),
        mask=None,
        barrier_driver=barrier_driver,
        monitor=EngineMonitor(inbox, events.append, clock),
        clock=clock,
        deadline_ms=50,
        replicas=ReplicaPolicy.SPREAD,
        pause=lambda: None,
    )
    members = (own, hung, newcomer)
    joined = ExpertMap(
        epoch=Epoch(1),
        num_experts=1,
        members=members,
        placement=np.zeros((1, NUM_RANKS, 1), dtype=np.int16),
        joiners=tuple(m.rank for m in members),
    )
    barrier_driver.on_map(joined)
    said = GraphBarrier(newcomer)
    said.on_map(joined)
    barrier_driver.on_update(said.own)
    assert not runner.prepare_to_adopt(joined)
    clock.advance(0.04)
    assert not runner.prepare_to_adopt(joined)
    assert not events
    clock.advance(0.02)
    for _ in range(2):
        assert not runner.prepare_to_adopt(joined)
        clock.advance(1.0)
    assert [e.rank for e in events if isinstance(e, Suspect)] == [hung.rank]
