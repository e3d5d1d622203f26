"""What one tenant may have of a step that others share: of rows that decode, and of prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.scheduler_limits import NO_LIMIT
from gpu_worker.engine.step_plan import StepPlan
from gpu_worker.engine.step_shares import BURST_STEPS
from shared.types import SamplingParams
from tests.unit.gpu_worker.engine.test_scheduler_tenants import of, step
from tests.unit.gpu_worker.engine.toy import origin, scheduler

SHARE = 3


def engine_of(**changes: int) -> Scheduler:
    sizes = {"step_tokens_max": 64, "prefill_chunk_tokens": 64, "running_max": 40}
    sizes |= {"kv_blocks": 256, "waiting_max": 128, "tenant_step_tokens": SHARE}
    return scheduler(**(sizes | changes))


def begin(engine: Scheduler, tenant: str, number: int, **fields: object) -> None:
    for n in range(number):
        tokens = (1 + n % 20, 1 + n // 20, 7)
        request = of(tenant, f"{tenant}/{n}", tokens=tokens, **{"max_tokens": 50, **fields})
        assert engine.submit(origin(), request) is None


def tokens(plan: StepPlan) -> Counter[str]:
    found: Counter[str] = Counter()
    for chunk in plan.chunks:
        found[chunk.sequence.scheduling.tenant] += chunk.num_tokens
    return found


def settled(engine: Scheduler) -> Scheduler:
    """What was left of earlier steps is spent."""
    for _ in range(3 * BURST_STEPS):
        step(engine)
    return engine


def test_a_tenant_alone_has_the_whole_step() -> None:
    engine = engine_of()
    begin(engine, "a", 20)
    step(engine)
    assert tokens(step(engine)) == {"a": 20}


def test_one_of_two_decodes_a_few_of_its_sequences_at_a_time_and_all_take_turns() -> None:
    engine = engine_of()
    begin(engine, "hostile", 20)
    step(engine)
    begin(engine, "other", 2)
    settled(engine)
    seen: Counter[str] = Counter()
    for _ in range(20):
        plan = step(engine)
        assert tokens(plan) == {"hostile": SHARE, "other": 2}
        seen.update(str(chunk.sequence.session) for chunk in plan.chunks)
    assert seen["other/0"] == seen["other/1"] == 20
    assert {seen[f"hostile/{n}"] for n in range(20)} <= {SHARE - 1, SHARE, SHARE + 1}


def test_what_came_to_an_instance_that_was_full_of_another_waits_for_no_full_step() -> None:
    engine = engine_of()
    begin(engine, "hostile", 20)
    for _ in range(4):
        step(engine)
    begin(engine, "other", 1)
    assert tokens(step(engine))["hostile"] <= 20, "nobody decodes yet who could be held up"
    assert tokens(step(engine))["hostile"] <= SHARE


def test_two_that_decode_alike_hold_each_other_up_as_they_would_alone() -> None:
    engine = engine_of()
    begin(engine, "a", 12)
    begin(engine, "b", 12)
    assert tokens(step(settled(engine))) == {"a": 12, "b": 12}


def test_a_weight_is_a_part_of_the_step_too() -> None:
    engine = engine_of()
    begin(engine, "heavy", 20, weight=2.0)
    begin(engine, "light", 10, weight=0.2)
    begin(engine, "other", 1)
    assert tokens(step(settled(engine))) == {"heavy": 2 * SHARE, "light": 1, "other": 1}


def test_long_prompts_of_one_are_computed_in_small_parts_beside_anothers_tokens() -> None:
    engine = engine_of()
    begin(engine, "other", 1)
    step(engine)
    prompt = tuple(1 + n % 20 for n in range(60))
    for n in range(3):
        engine.submit(origin(), of("hostile", f"hostile/{n}", tokens=(1 + n, *prompt)))
    first = tokens(step(engine))
    assert first["hostile"] <= BURST_STEPS * SHARE
    for _ in range(8):
        found = tokens(step(engine))
        assert found["other"] == 1
        assert 1 <= found["hostile"] <= SHARE


def test_who_asks_for_little_has_a_short_prompt_computed_at_once() -> None:
    engine = engine_of()
    begin(engine, "hostile", 20)
    begin(engine, "other", 1)
    settled(engine)
    engine.submit(origin(), of("other", "late", tokens=tuple(range(1, 8)), max_tokens=4))
    plan = step(engine)
    assert {str(c.sequence.session): c.num_tokens for c in plan.chunks}["late"] == 7


def test_what_a_tenant_decodes_leaves_some_of_its_part_to_its_prompts() -> None:
    engine = engine_of(tenant_step_tokens=4)
    begin(engine, "hostile", 20)
    begin(engine, "other", 1)
    settled(engine)
    engine.submit(origin(), of("hostile", "new", tokens=tuple(range(1, 20)), max_tokens=2))
    for _ in range(12):
        plan = step(engine)
        assert tokens(plan)["hostile"] <= 4
        if any(str(s.session) == "new" for s in plan.sampled):
            return
    raise AssertionError("its prompt was never computed")


def test_a_tenant_that_only_other_ranks_serve_counts() -> None:
    engine = engine_of()
    begin(engine, "hostile", 20)
    engine.tenants_elsewhere = frozenset({"hostile", "other"})
    assert tokens(step(settled(engine))) == {"hostile": SHARE}
    engine.tenants_elsewhere = frozenset({"hostile"})
    step(engine)  # with the prompts that had to wait
    assert tokens(step(engine)) == {"hostile": 20}


def test_what_a_death_makes_a_rank_compute_again_is_not_held_up() -> None:
    engine = engine_of()
    begin(engine, "other", 1)
    step(engine)
    moved = tuple(1 + n % 20 for n in range(40))
    engine.submit(
        origin(), of("moved", "m", tokens=moved, num_emitted=20, attempt=1, max_tokens=30)
    )
    assert tokens(step(engine)) == {"moved": 40, "other": 1}


def test_a_step_that_is_thrown_away_leaves_what_comes_next_whole() -> None:
    engine = engine_of()
    begin(engine, "hostile", 20)
    begin(engine, "other", 1)
    settled(engine)
    engine.abandon(engine.plan())
    found = tokens(step(engine))
    assert found["other"] == 1
    assert 1 <= found["hostile"] <= SHARE


CARD = {"tenant_step_tokens": NO_LIMIT, "tenant_host_rows": SHARE}
DRAWN_BY_HOST = SamplingParams(max_tokens=50, min_p=0.1, ignore_eos=True)


def begin_drawn(engine: Scheduler, tenant: str, number: int) -> None:
    for n in range(number):
        request = of(tenant, f"{tenant}/drawn/{n}", tokens=(1 + n % 20, 1 + n // 20, 7))
        assert engine.submit(origin(), replace(request, sampling=DRAWN_BY_HOST)) is None


def test_where_a_card_draws_few_tokens_of_one_are_drawn_by_the_host_and_all_take_turns() -> None:
    engine = engine_of(**CARD)
    begin(engine, "other", 2)
    begin(engine, "hostile", 4)
    step(engine)
    begin_drawn(engine, "hostile", 20)
    for _ in range(10):
        assert tokens(step(engine))["other"] == 2
    seen: Counter[str] = Counter()
    for _ in range(20):
        plan = step(engine)
        assert tokens(plan) == {"hostile": 4 + SHARE, "other": 2}
        seen.update(str(chunk.sequence.session) for chunk in plan.chunks)
    assert {seen[f"hostile/drawn/{n}"] for n in range(20)} <= {SHARE - 1, SHARE, SHARE + 1}
    assert {seen[f"hostile/{n}"] for n in range(4)} == {20}, "the card draws these"


def test_what_drawn_tokens_have_cost_says_how_many_of_one_tenant_fit_and_all_take_turns() -> None:
    engine = engine_of(tenant_step_tokens=NO_LIMIT, tenant_host_rows=64)
    begin(engine, "other", 2)
    begin_drawn(engine, "hostile", 20)
    assert tokens(step(settled(engine))) == {"hostile": 20, "other": 2}
    engine.learn_draws(num_rows=20, drawn_s=20 / 128, step_s=20 / 128 + 1 / 8)
    seen: Counter[str] = Counter()
    for _ in range(20):
        plan = step(engine)
        assert tokens(plan) == {"hostile": 4, "other": 2}, "1/128 s each, a quarter of 1/8 s"
        seen.update(str(chunk.sequence.session) for chunk in plan.chunks)
    assert {seen[f"hostile/drawn/{n}"] for n in range(20)} == {4}
    engine.learn_draws(num_rows=1, drawn_s=100.0, step_s=100.1)
    for _ in range(8):
        assert tokens(step(engine)) == {"hostile": 1, "other": 2}, "one, so that nobody starves"


def test_prompts_whose_first_token_the_host_draws_count_among_them() -> None:
    engine = engine_of(**CARD)
    begin(engine, "other", 2)
    step(engine)
    begin_drawn(engine, "hostile", 20)
    for _ in range(12):
        assert sum(c.sequence.scheduling.tenant == "hostile" for c in step(engine).chunks) <= SHARE


def test_alone_or_beside_one_who_has_as_many_drawn_nobody_is_limited() -> None:
    engine = engine_of(**CARD)
    begin_drawn(engine, "a", 12)
    step(engine)
    assert tokens(step(engine)) == {"a": 12}
    begin_drawn(engine, "b", 12)
    for _ in range(12):
        step(engine)
    assert tokens(step(engine)) == {"a": 12, "b": 12}
