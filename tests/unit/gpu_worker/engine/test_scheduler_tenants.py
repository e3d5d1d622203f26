"""Several tenants on one rank: who is served, in proportion to what; priorities and deadlines; and
that no tenant finds another's blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.step_plan import StepPlan
from shared.types import Attempt, SchedulingParams, SessionId
from shared.wire import Submit
from tests.unit.gpu_worker.engine.toy import origin, scheduler, submit


def of(tenant: str, name: str, *, tokens: tuple[int, ...] = (3, 4, 5), **fields: object) -> Submit:
    sampling = {k: fields.pop(k) for k in ("max_tokens",) if k in fields}
    emitted = {k: fields.pop(k) for k in ("num_emitted", "attempt") if k in fields}
    plain = submit(name, tokens, **emitted, **sampling)  # type: ignore[arg-type]
    return replace(plain, scheduling=SchedulingParams(tenant=tenant, **fields))  # type: ignore[arg-type]


def step(engine: Scheduler) -> StepPlan:
    plan = engine.plan()
    engine.commit(plan, [5] * len(plan.sampled))
    return plan


def names(plan: StepPlan) -> list[str]:
    return [str(chunk.sequence.session) for chunk in plan.chunks]


def order_of_starts(engine: Scheduler) -> list[str]:
    started: list[str] = []
    while engine.has_work:
        started += [str(s.session) for s in step(engine).admitted]
    return started


@dataclass
class Backlog:
    """Keeps `waiting` requests of each tenant in the queue, and counts the tokens served."""

    engine: Scheduler
    sizes: dict[str, tuple[int, int]]  # of prompts and answers
    weights: dict[str, float]
    number: int = 0

    def run(self, steps: int, waiting: int) -> Counter[str]:
        served: Counter[str] = Counter()
        waits: Counter[str] = Counter()
        for _ in range(steps):
            for tenant in self.sizes:
                while waits[tenant] < waiting:
                    self._send(tenant)
                    waits[tenant] += 1
            plan = step(self.engine)
            for sequence in plan.admitted:
                waits[sequence.scheduling.tenant] -= 1
                served[sequence.scheduling.tenant] += sequence.num_charged
            for sequence in plan.sampled:
                served[sequence.scheduling.tenant] += 1
        return served

    def _send(self, tenant: str) -> None:
        self.number += 1
        num_prompt, max_tokens = self.sizes[tenant]
        prompt = tuple(1 + (self.number + i) % 20 for i in range(num_prompt))
        request = of(
            tenant,
            f"{tenant}/{self.number}",
            tokens=prompt,
            max_tokens=max_tokens,
            weight=self.weights[tenant],
        )
        assert self.engine.submit(origin(), request) is None


SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=40, deadline=None)
@given(a=SIZES, b=SIZES, weight=st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_tokens_served_follow_the_weights_whatever_the_requests_are_like(
    a: tuple[int, int], b: tuple[int, int], weight: float
) -> None:
    engine = scheduler(waiting_max=64, running_max=4, kv_blocks=64)
    backlog = Backlog(engine, {"a": a, "b": b}, {"a": weight, "b": 1.0})
    served = backlog.run(steps=300, waiting=8)
    # All that either is ahead of the other: its sequences that run, up to `mid_stream_max` of them.
    lead = 16 * 24
    assert abs(served["a"] / weight - served["b"]) <= lead / min(weight, 1.0)
    assert min(served.values()) > 100


def test_one_tenants_queue_is_not_another_tenants_wait() -> None:
    engine = scheduler(waiting_max=64, running_max=2)
    for number in range(20):
        engine.submit(origin(), of("greedy", f"greedy/{number}", max_tokens=20))
    for _ in range(3):
        step(engine)
    engine.submit(origin(), of("late", "late", max_tokens=9))
    assert "late" in names(step(engine)), "beyond `running_max`, for it runs nothing yet"
    engine.submit(origin(), of("late", "late/2"))
    engine.submit(origin(), of("late", "late/3"))
    step(engine)
    assert engine.load().running == 3, "one of two is its share; no more than that"


def test_a_lone_tenant_never_exceeds_running_max() -> None:
    engine = scheduler(waiting_max=64, running_max=2)
    for number in range(20):
        engine.submit(origin(), of("alone", str(number), max_tokens=20))
    for _ in range(5):
        step(engine)
        assert engine.load().running <= 2


def test_prompts_share_a_step_by_what_their_tenants_were_served() -> None:
    """A step has 16 tokens, a chunk 8. Greedy's prompts came first and would fill many steps."""
    engine = scheduler(waiting_max=64, kv_blocks=64)
    for number in range(4):
        prompt = tuple(1 + (number * 7 + i) % 20 for i in range(40))
        engine.submit(origin(), of("greedy", f"greedy/{number}", tokens=prompt))
    step(engine)
    engine.submit(origin(), of("late", "late", tokens=(9, 8, 7, 6, 5, 4)))
    assert "late" in names(step(engine))


def test_a_full_queue_of_one_tenant_has_room_for_another() -> None:
    engine = scheduler(waiting_max=18)
    refused = [engine.submit(origin(), of("greedy", f"greedy/{number}")) for number in range(40)]
    assert sum(reply is None for reply in refused) == 16
    assert all(reply.retryable for reply in refused if reply is not None)
    assert engine.submit(origin(), of("late", "late")) is None


def test_without_keys_the_one_tenant_may_fill_the_queue() -> None:
    engine = scheduler(waiting_max=18)
    refused = [engine.submit(origin(), of("", str(number))) for number in range(40)]
    assert sum(reply is None for reply in refused) == 18


def test_more_urgent_requests_begin_first_whoever_sent_them() -> None:
    engine = scheduler(running_max=1)
    engine.submit(origin(), of("a", "plain", max_tokens=1))
    engine.submit(origin(), of("a", "later", priority=5, max_tokens=1))
    engine.submit(origin(), of("b", "urgent", priority=-3, max_tokens=1))
    assert order_of_starts(engine) == ["urgent", "plain", "later"]


def test_within_a_tenant_the_earlier_deadline_begins_first() -> None:
    engine = scheduler(running_max=1)
    for name, deadline_at in (("none", 0.0), ("late", 200.0), ("soon", 100.0)):
        engine.submit(origin(), of("a", name, deadline_at=deadline_at, max_tokens=1))
    assert order_of_starts(engine) == ["soon", "late", "none"]


def test_moved_sessions_come_before_new_ones_however_urgent_these_are() -> None:
    engine = scheduler(running_max=1)
    engine.submit(origin(), of("a", "new", priority=-9, max_tokens=1))
    engine.submit(origin(), of("b", "moved", num_emitted=1, attempt=1, priority=9, max_tokens=2))
    assert order_of_starts(engine) == ["moved", "new"]


def test_the_least_urgent_is_preempted_first() -> None:
    engine = scheduler(kv_blocks=4, kv_block_tokens=2, context_tokens_max=8)
    engine.submit(origin(), of("a", "idle", tokens=(1, 2), max_tokens=6, priority=1))
    step(engine)
    engine.submit(origin(), of("a", "urgent", tokens=(3, 4), max_tokens=6))
    for _ in range(6):
        step(engine)
        if engine.load().waiting:
            break
    waiting = engine._waiting.first()
    assert waiting is not None
    assert waiting.session == "idle"


def test_if_blocks_run_out_the_tenant_that_runs_most_gives_up_a_sequence() -> None:
    """Although the other came last: its few would else pay for the many."""
    engine = scheduler(kv_blocks=12, kv_block_tokens=2, context_tokens_max=24)
    for number in range(3):
        engine.submit(origin(), of("many", f"many/{number}", tokens=(1, number + 2), max_tokens=9))
    step(engine)
    engine.submit(origin(), of("few", "few", tokens=(9, 8), max_tokens=9))
    step(engine)
    assert engine.load().running == 4
    while not engine.load().waiting:
        step(engine)
    waiting = engine._waiting.first()
    assert waiting is not None
    assert waiting.session == "many/2"
    while engine.has_work:
        step(engine)


def test_an_abandoned_step_charges_nobody() -> None:
    engine = scheduler(waiting_max=64, running_max=1)
    engine.submit(origin(), of("a", "a", tokens=tuple(range(1, 9)), max_tokens=1))
    engine.submit(origin(), of("b", "b", max_tokens=1))
    plans = []
    for _ in range(3):
        plan = engine.plan()
        plans.append(names(plan))
        engine.abandon(plan)
        assert engine._shares._fair.virtual_time("a") == 0
    assert plans[0] == plans[1] == plans[2]


def test_a_preempted_prompt_is_charged_once() -> None:
    engine = scheduler(kv_blocks=4, kv_block_tokens=2, context_tokens_max=8)
    engine.submit(origin(), of("a", "old", tokens=(1, 2), max_tokens=6))
    engine.submit(origin(), of("b", "young", tokens=(3, 4), max_tokens=6))
    fair = engine._shares._fair
    fair.enter("b", 1.0)  # so that it is still known at the end
    while engine.has_work:
        step(engine)
    assert fair.virtual_time("b") == 2 + 6


# The prefix cache.

LONG = tuple(range(1, 21))


@pytest.mark.parametrize(
    ("first", "second", "num_cached"),
    [(b"a" * 32, b"b" * 32, 0), (b"a" * 32, b"", 0), (b"", b"a" * 32, 0), (b"a" * 32,) * 2 + (16,)],
)
def test_blocks_are_found_under_the_same_salt_only(
    first: bytes, second: bytes, num_cached: int
) -> None:
    engine = scheduler()
    engine.submit(origin(), of("a", "a", tokens=LONG, cache_salt=first, max_tokens=1))
    step(engine)
    while engine.has_work:
        step(engine)
    before = engine.load().prefix_tokens_cached
    engine.submit(origin(), of("b", "b", tokens=LONG, cache_salt=second, max_tokens=1))
    plan = engine.plan()
    assert plan.batch.position_T[0] == num_cached
    engine.commit(plan, [5] * len(plan.sampled))
    assert engine.load().prefix_tokens_cached - before == num_cached


def test_nobody_waits_for_a_block_of_another_tenant() -> None:
    """Being passed over until somebody has computed the same block would tell that it is the
    same."""
    engine = scheduler()
    engine.submit(origin(), of("a", "a", tokens=LONG, cache_salt=b"a" * 32))
    step(engine)
    engine.submit(origin(), of("b", "b", tokens=LONG, cache_salt=b"b" * 32))
    assert "b" in names(step(engine))


def test_a_later_attempt_finds_the_blocks_of_its_salt() -> None:
    engine = scheduler()
    request = of("a", "s", tokens=LONG, cache_salt=b"a" * 32)
    engine.submit(origin(), request)
    for _ in range(4):
        step(engine)
    engine.cancel(SessionId("s"), Attempt(0))
    again = replace(request, attempt=Attempt(1), tokens=(*LONG, 5), num_emitted=1)
    engine.submit(origin(), again)
    assert engine.plan().batch.position_T[0] == 20
