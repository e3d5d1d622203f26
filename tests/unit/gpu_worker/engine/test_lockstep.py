"""Several engines in lockstep over the local exchange: one dies, and every stream goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.mailbox import (
    Arrival,
    EngineEvent,
    Inbox,
    NewMap,
    SendWake,
    StepTokens,
    Stop,
    ThreadWaiter,
)
from gpu_worker.engine.monitor import EngineMonitor
from gpu_worker.engine.step_batch import Forward, StepBatch
from gpu_worker.engine.step_runner import ModelRunner
from gpu_worker.exchange.interface import Exchange
from shared.clock import SystemClock
from shared.expert_map import ExpertMap
from shared.types import Epoch, FinishReason, Incarnation, Member, RankId, Step
from shared.wire import Wake
from tests.support.local_exchange import LocalHub
from tests.unit.gpu_worker.engine.toy import HIDDEN, ToyModel, alone, origin, scheduler, submit

PATIENCE_S = 20
NUM_RANKS = 3


class Death(BaseException):
    pass


class MortalModel(ToyModel):
    """Dies in a forward, once asked to: before its messages to the peers, who cannot commit that
    step, or after them, so that they do."""

    dies_in_forwards = -1
    dies_late = False

    def forward(self, batch: StepBatch, exchange: Exchange) -> Forward:
        self.dies_in_forwards -= 1
        dies = self.dies_in_forwards == 0
        if not dies or self.dies_late:
            forward = super().forward(batch, exchange)
        if dies:
            raise Death
        return forward


class Cluster:
    """Ranks as threads, and what the control plane and the links do for them."""

    def __init__(self) -> None:
        self.hub = LocalHub(NUM_RANKS, HIDDEN, 1)
        self.members = [
            Member(rank=RankId(r), incarnation=Incarnation(1)) for r in range(NUM_RANKS)
        ]
        self.inboxes = [Inbox(ThreadWaiter()) for _ in self.members]
        self.models = [MortalModel() for _ in self.members]
        self.tokens: queue.Queue[StepTokens] = queue.Queue()
        self.wakes: list[tuple[Epoch, Step]] = []
        self.died = threading.Event()
        self.engines = [self._engine(member) for member in self.members]
        self.threads = [threading.Thread(target=self._run, args=(e,)) for e in self.engines]

    def _engine(self, member: Member) -> Engine:
        clock = SystemClock()
        inbox = self.inboxes[member.rank]

        def post(event: EngineEvent) -> None:
            self._on_event(member, event)

        monitor = EngineMonitor(inbox, post, clock)
        return Engine(
            member=member,
            runner=ModelRunner(
                self.models[member.rank], self.hub.exchange(member, monitor, clock, 1e9)
            ),
            scheduler=scheduler(),
            inbox=inbox,
            monitor=monitor,
            post=post,
            clock=clock,
        )

    def _run(self, engine: Engine) -> None:
        try:
            engine.run()
        except Death:
            self.died.set()

    def _on_event(self, member: Member, event: EngineEvent) -> None:
        if isinstance(event, StepTokens):
            self.tokens.put(event)
        elif isinstance(event, SendWake):
            self.wakes.append((event.epoch, event.step))
            wake = Wake(
                rank=member.rank,
                incarnation=member.incarnation,
                epoch=event.epoch,
                step=event.step,
            )
            for other in self.members:
                if other != member:
                    self.inboxes[other.rank].put(wake)

    def publish(self, epoch: int, ranks: list[int]) -> None:
        placement = np.full((1, NUM_RANKS, 1), -1, dtype=np.int16)
        placement[0, ranks] = 0
        expert_map = ExpertMap(
            epoch=Epoch(epoch),
            num_experts=1,
            members=tuple(self.members[rank] for rank in ranks),
            placement=placement,
        )
        for rank in ranks:
            self.inboxes[rank].put(NewMap(expert_map=expert_map, seen_at=0.0))

    def end(self) -> None:
        for inbox in self.inboxes:
            inbox.put(Stop())
        # One may stop while others wait for it in a step: they leave by a newer epoch.
        for epoch, rank in enumerate(range(NUM_RANKS), start=100):
            self.publish(epoch, [rank])
        for thread in self.threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    one = Cluster()
    for thread in one.threads:
        thread.start()
    one.publish(1, list(range(NUM_RANKS)))
    yield one
    one.end()


class Clients:
    """Sessions and where they are; moves those of a dead rank, as a gateway does."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.ids: dict[str, list[int]] = {}
        self.place: dict[str, int] = {}
        self.attempt: dict[str, int] = {}
        self.finish: dict[str, FinishReason] = {}

    def open(self, session: str, prompt: tuple[int, ...], rank: int) -> None:
        self.prompts[session], self.ids[session], self.attempt[session] = prompt, [], -1
        self.send(session, rank)

    def send(self, session: str, rank: int) -> None:
        self.place[session] = rank
        self.attempt[session] += 1
        request = submit(
            session,
            (*self.prompts[session], *self.ids[session]),
            attempt=self.attempt[session],
            num_emitted=len(self.ids[session]),
            max_tokens=12,
        )
        self.cluster.inboxes[rank].put(Arrival(origin=origin(), submit=request))

    def receive(self) -> None:
        event = self.cluster.tokens.get(timeout=PATIENCE_S)
        for reply in [r for batch in event.sessions.values() for r in batch]:
            if reply.attempt == self.attempt[reply.session]:
                assert reply.index == len(self.ids[reply.session])
                self.ids[reply.session] += reply.ids
                if reply.finish:
                    self.finish[reply.session] = reply.finish

    def check(self) -> None:
        while len(self.finish) < len(self.prompts):
            self.receive()
        for session, prompt in self.prompts.items():
            sampling = submit(max_tokens=12).sampling
            assert (self.ids[session], self.finish[session]) == alone(prompt, sampling)


def test_one_rank_with_work_wakes_all(cluster: Cluster) -> None:
    clients = Clients(cluster)
    clients.open("s", (1, 2, 3), rank=1)
    clients.check()


@pytest.mark.parametrize("dying", range(NUM_RANKS))
@pytest.mark.parametrize("forwards", [1, 2, 4, 9])
@pytest.mark.parametrize("late", [False, True])
def test_a_death_at_any_step_changes_no_token(
    cluster: Cluster, dying: int, forwards: int, late: bool
) -> None:
    cluster.models[dying].dies_late = late
    cluster.models[dying].dies_in_forwards = forwards
    clients = Clients(cluster)
    for number in range(6):
        clients.open(f"s{number}", tuple(range(1, 2 + number * 3)), rank=number % NUM_RANKS)
    assert cluster.died.wait(PATIENCE_S)
    survivors = [rank for rank in range(NUM_RANKS) if rank != dying]
    cluster.publish(2, survivors)
    while not cluster.tokens.empty():
        clients.receive()
    victims = [s for s, r in clients.place.items() if r == dying and s not in clients.finish]
    for number, session in enumerate(victims):
        clients.send(session, survivors[number % 2])
    clients.check()
