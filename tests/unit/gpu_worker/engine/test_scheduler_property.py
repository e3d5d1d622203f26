"""Whatever happens to a session on its way, its tokens are those of running it alone, and the KV
blocks are in order after every event. Also if steps are planned ahead and events come while they
are in flight, if each rank keeps replicas of some of the other's blocks, and if steps verify
drafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.engine.drafting import draft_step
from gpu_worker.engine.sampler import sample
from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.scheduler_limits import SchedulerLimits
from gpu_worker.engine.sequence import Origin
from gpu_worker.engine.step_plan import NO_DRAFTS, StepPlan
from gpu_worker.exchange.single_rank import SingleRankExchange
from gpu_worker.kv_replication.writer import ReplicaWriter
from shared.types import (
    DEFAULT_SCHEDULING,
    Attempt,
    FinishReason,
    RankId,
    SamplingParams,
    SchedulingParams,
    SessionId,
    ThinkingBudget,
)
from shared.wire import SessionTokens, Submit
from tests.unit.gpu_worker.engine.kv_audit import BlockSnapshot, KvAudit
from tests.unit.gpu_worker.engine.toy import EOS, VOCAB, ToyModel, alone
from tests.unit.gpu_worker.kv_replication.fakes import ArrayCache, Channel, Endpoint, Store, member

THINKING = ThinkingBudget(
    tokens=3, opened=True, start_ids=(7,), end_ids=(11, 9), forced_ids=(11, 9)
)
SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8, 3.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 14),
    min_tokens=st.integers(0, 6),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (7,)]),
    bad_words=st.sampled_from([(), (), ((4,), (2, 3), (9, 9, 9))]),
    allowed_token_ids=st.sampled_from([(), (1, 7, 9, 11, 15)]),
    thinking_budget=st.sampled_from([None, None, None, THINKING, replace(THINKING, opened=False)]),
)
# Without salts: blocks of one content have one name then, which the audit knows.
SCHEDULINGS = st.builds(
    SchedulingParams,
    tenant=st.sampled_from(["", "a", "b"]),
    weight=st.sampled_from([1.0, 3.0]),
    priority=st.sampled_from([0, 0, 0, 1]),
    deadline_at=st.sampled_from([0.0, 1.0, 2.0]),
)
# Most prompts begin alike, for different lengths: only then does anything come from the cache.
PROMPTS = st.one_of(
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=12),
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 2), max_size=3)).map(
        lambda drawn: [*range(1, drawn[0] + 1), *drawn[1]]
    ),
).map(tuple)
EVENTS = st.lists(
    st.sampled_from(
        ["arrive", "begin", "ahead", "end", "step", "abandon", "move", "late", "carry", "cut"]
    ),
    min_size=30,
    max_size=80,
)


@st.composite
def limits(draw: st.DrawFn) -> SchedulerLimits:
    step_tokens_max = draw(st.integers(4, 12))
    return SchedulerLimits(
        vocab_size=VOCAB,
        context_tokens_max=24,
        kv_block_tokens=draw(st.sampled_from([1, 2, 3])),
        kv_blocks=draw(st.integers(24, 40)),
        step_tokens_max=step_tokens_max,
        prefill_chunk_tokens=draw(st.integers(1, step_tokens_max)),
        running_max=draw(st.integers(1, 4)),
        waiting_max=100,
        prefix_cache=draw(st.sampled_from([True, True, True, False])),
    )


@dataclass
class Client:
    """A gateway's view of one session: accepts the current attempt and the next index."""

    name: SessionId
    prompt: tuple[int, ...]
    sampling: SamplingParams
    scheduling: SchedulingParams = DEFAULT_SCHEDULING
    attempt: int = 0
    emitted: list[int] = field(default_factory=list)
    finish: FinishReason | None = None

    def submit(self) -> Submit:
        return Submit(
            session=self.name,
            attempt=Attempt(self.attempt),
            tokens=(*self.prompt, *self.emitted),
            num_emitted=len(self.emitted),
            sampling=self.sampling,
            scheduling=self.scheduling,
        )

    def accept(self, reply: SessionTokens) -> None:
        if reply.attempt != self.attempt:
            return
        assert reply.error is None
        assert self.finish is None
        assert reply.index == len(self.emitted)
        self.emitted += reply.ids
        self.finish = reply.finish


class Device:
    """Runs steps in the order of their launch; what one samples is there for the next."""

    def __init__(self, model: ToyModel, *, drafts: bool) -> None:
        self.model = model
        self.drafts = drafts
        self.flights: list[tuple[StepPlan, list[int], Mapping[int, int]]] = []
        self.before = BlockSnapshot(
            {}, 0, {}, 0
        )  # of the first in flight, if nothing has come since
        self.is_first = True
        self._former_ids: list[int] = []

    def launch(self, plan: StepPlan) -> None:
        self.is_first = not self.flights
        ids = [t if t >= 0 else self._former_ids[-1 - t] for t in plan.batch.token_ids_T.tolist()]
        batch = replace(plan.batch, token_ids_T=np.array(ids, dtype=np.int32))
        self.model.write(batch)
        self._former_ids = sample(self.model.logits(batch), plan.draws)
        drafts: Mapping[int, int] = NO_DRAFTS
        if self.drafts:
            drafts = draft_step(self.model, SingleRankExchange(), plan, self._former_ids)
        self.flights.append((plan, self._former_ids, drafts))


@dataclass(frozen=True)
class KvReplicaLimits:
    """Of what a rank keeps for the other it finds so many names of eight. A block takes four
    stages to get there, of which a step brings so many."""

    num_slots: int
    num_rooms: int
    num_found: int
    num_stages: int


KV_REPLICA_LIMITS = st.builds(
    KvReplicaLimits,
    num_slots=st.sampled_from([0, 4, 12, 40]),
    num_rooms=st.integers(1, 4),
    num_found=st.sampled_from([4, 7, 8, 8]),
    num_stages=st.sampled_from([0, 1, 30, 30]),
)


class FakeKvReplicas:
    """What each of two ranks keeps of the other's blocks."""

    def __init__(self, models: list[ToyModel], given: KvReplicaLimits) -> None:
        self._given = given
        self._block_bytes = models[0].cache[0].nbytes
        self._stores = [Store(lambda name: name[0] % 8 >= given.num_found) for _ in models]
        self.endpoints = [Endpoint(self._open(1 - r), store=self._stores[r]) for r in range(2)]
        self.writers = [self._writer(rank, model) for rank, model in enumerate(models)]

    def carry(self, rank: int, number: int = 0) -> None:
        """What is on its way from this rank; `number` says in which order."""
        for _ in range(self._given.num_stages):
            self.endpoints[rank].all[0].deliver(number)

    def cut(self, rank: int) -> None:
        self.endpoints[rank].all[0].close()
        self.endpoints[rank].all = [self._open(1 - rank)]

    def check(self, audits: list[KvAudit]) -> None:
        for audit, endpoint in zip(audits, self.endpoints, strict=True):
            region = endpoint.all[0].region
            for slot, name in region.known.items():
                audit.check_content(name, region.slots[slot].view(np.int64).tolist())

    def _open(self, target: int) -> Channel:
        return Channel(
            member(target),
            self._stores[target],
            num_slots=self._given.num_slots,
            num_staging_buffers=self._given.num_rooms,
            block_bytes=self._block_bytes,
        )

    def _writer(self, rank: int, model: ToyModel) -> ReplicaWriter:
        cache = ArrayCache(model.cache.view(np.uint8))
        writer = ReplicaWriter(cache, self.endpoints[rank], rank=RankId(rank), blocks_per_pump=4)
        writer.use([member(1 - rank)])
        return writer


class SchedulerHarness:
    """Two ranks, and clients whose sessions move between them."""

    def __init__(
        self,
        given_limits: SchedulerLimits,
        kv_replica_limits: KvReplicaLimits,
        *,
        drafts: bool = False,
    ) -> None:
        self.num_ahead = self.num_drafted = self.num_accepted = 0
        models = [ToyModel(given_limits.kv_blocks, given_limits.kv_block_tokens) for _ in range(2)]
        self.devices = [Device(model, drafts=drafts) for model in models]
        self.replicas = FakeKvReplicas([device.model for device in self.devices], kv_replica_limits)
        self.ranks = [
            Scheduler(given_limits, (EOS,), replicator=writer) for writer in self.replicas.writers
        ]
        self.audits = [
            KvAudit(r, d.model, given_limits) for r, d in zip(self.ranks, self.devices, strict=True)
        ]
        self.clients: dict[SessionId, Client] = {}
        self.place: dict[SessionId, int] = {}

    def arrive(self, client: Client) -> None:
        self.clients[client.name] = client
        self.send(client, len(self.clients) % 2)

    def send(self, client: Client, rank: int) -> None:
        self.place[client.name] = rank
        self.devices[rank].is_first = False
        submit = client.submit()
        self.audits[rank].note_submit(submit.tokens)
        reply = self.ranks[rank].submit(Origin(1), submit)
        if reply is not None:
            client.accept(reply)

    def move(self, number: int, tell_the_old_rank: bool) -> None:
        open_clients = [c for c in self.clients.values() if c.finish is None]
        if not open_clients:
            return
        client = open_clients[number % len(open_clients)]
        old = self.place[client.name]
        if tell_the_old_rank:
            self.devices[old].is_first = False
            self.ranks[old].cancel(client.name, Attempt(client.attempt))
        client.attempt += 1
        self.send(client, (old + number) % 2)

    def begin(self, rank: int) -> None:
        device = self.devices[rank]
        if device.flights:
            return
        engine, audit = self.ranks[rank], self.audits[rank]
        device.before = audit.take_snapshot()
        plan = engine.plan()
        assert plan.batch.num_tokens > 0 or not engine.has_work
        self._launch(rank, plan)

    def ahead(self, rank: int) -> None:
        if len(self.devices[rank].flights) == 1 and (plan := self.ranks[rank].plan_ahead()):
            self.num_ahead += 1
            self._launch(rank, plan)

    def end(self, rank: int) -> None:
        device = self.devices[rank]
        if not device.flights:
            return
        plan, ids, drafts = device.flights.pop(0)
        self.audits[rank].note_commit(plan)
        committed = self.ranks[rank].commit(plan, ids, drafts=drafts)
        self.num_drafted += committed.num_drafted
        self.num_accepted += committed.num_accepted
        for batch in committed.replies.values():
            for reply in batch:
                self.clients[reply.session].accept(reply)
        self.replicas.writers[rank].send_offered()
        self.replicas.carry(rank)

    def check(self) -> None:
        for audit in self.audits:
            audit.check()
        self.replicas.check(self.audits)

    def step(self, rank: int) -> None:
        self.begin(rank)
        self.end(rank)

    def abandon(self, rank: int) -> None:
        """All that is in flight."""
        device = self.devices[rank]
        self.begin(rank)
        undisturbed = len(device.flights) == 1 and device.is_first
        while device.flights:
            self.ranks[rank].abandon(device.flights.pop()[0])
        if undisturbed:
            self.audits[rank].check_restored(device.before)

    def _launch(self, rank: int, plan: StepPlan) -> None:
        self.audits[rank].check()
        self.audits[rank].check_plan(plan)
        self.devices[rank].launch(plan)

    def finish(self) -> None:
        for _ in range(2000):
            if not any(rank.has_work for rank in self.ranks):
                return
            for rank in (0, 1):
                self.begin(rank)
                self.ahead(rank)
                self.end(rank)
        raise AssertionError("sessions do not end")


def test_a_moved_session_computes_only_what_its_copies_lack() -> None:
    harness = SchedulerHarness(
        SchedulerLimits(
            vocab_size=VOCAB,
            context_tokens_max=40,
            kv_block_tokens=2,
            kv_blocks=40,
            step_tokens_max=16,
            prefill_chunk_tokens=8,
            running_max=4,
            waiting_max=8,
        ),
        KvReplicaLimits(num_slots=40, num_rooms=4, num_found=8, num_stages=40),
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    client = Client(SessionId("s"), tuple(range(1, 14)), sampling)
    harness.arrive(client)
    old = harness.place[client.name]
    for _ in range(8):
        harness.step(old)
    num_known = len(client.prompt) + len(client.emitted)
    harness.move(1, tell_the_old_rank=False)
    harness.begin(1 - old)
    plan, *_ = harness.devices[1 - old].flights[0]
    assert plan.batch.position_T.tolist() == [*range((num_known - 1) // 2 * 2, num_known)]
    harness.finish()
    assert (client.emitted, client.finish) == alone(client.prompt, client.sampling, 40)


@settings(max_examples=150, deadline=None)
@given(
    given_limits=limits(),
    kv_replica_limits=KV_REPLICA_LIMITS,
    requests=st.lists(st.tuples(PROMPTS, SAMPLINGS, SCHEDULINGS), min_size=1, max_size=8),
    events=EVENTS,
    numbers=st.lists(st.integers(0, 7), min_size=80, max_size=80),
    drafts=st.booleans(),
)
def test_tokens_are_those_of_the_undisturbed_run(
    given_limits: SchedulerLimits,
    kv_replica_limits: KvReplicaLimits,
    requests: list[tuple[tuple[int, ...], SamplingParams, SchedulingParams]],
    events: list[str],
    numbers: list[int],
    drafts: bool,
) -> None:
    harness = SchedulerHarness(given_limits, kv_replica_limits, drafts=drafts)
    left = [
        Client(SessionId(f"s{i}"), prompt, sampling, scheduling)
        for i, (prompt, sampling, scheduling) in enumerate(requests)
    ]
    for event, number in zip(events, numbers, strict=False):
        if event == "arrive" and left:
            harness.arrive(left.pop(0))
        elif event in ("begin", "ahead", "end", "step", "abandon"):
            getattr(harness, event)(number % 2)
        elif event == "move":
            harness.move(number, tell_the_old_rank=number >= 4)
        elif event == "late" and harness.clients:
            client = list(harness.clients.values())[number % len(harness.clients)]
            if client.attempt:
                harness.devices[number % 2].is_first = False
                harness.ranks[number % 2].cancel(client.name, Attempt(client.attempt - 1))
        elif event == "carry":
            harness.replicas.carry(number % 2, number // 2)
        elif event == "cut":
            harness.replicas.cut(number % 2)
        harness.check()
    for client in left:
        harness.arrive(client)
    clients = list(harness.clients.values())
    num_before = {c.name: len(c.emitted) for c in clients}
    harness.finish()
    num_made = (len(c.emitted) - num_before[c.name] for c in clients)
    limited = any(c.sampling.bad_words or c.sampling.thinking_budget for c in clients)
    assert harness.num_ahead or limited or drafts or all(num <= 2 for num in num_made)
    for client in clients:
        expected, finish = alone(client.prompt, client.sampling, given_limits.tokens_max)
        assert (client.emitted, client.finish) == (expected, finish)
    for rank in harness.ranks:
        load = rank.load()
        assert (load.tokens, load.kv_blocks_free) == (0, load.kv_blocks)
