"""What the prefix cache spares, and what it must not change. Blocks have 4 tokens, chunks 8."""

from __future__ import annotations

import pytest

from gpu_worker.engine.scheduler import Committed, Scheduler
from shared.types import Attempt, SessionId
from shared.wire import SessionTokens
from tests.unit.gpu_worker.engine.toy import origin, scheduler, submit

LONG = tuple(range(1, 21))


def run_step(engine: Scheduler, token: int = 5) -> Committed:
    plan = engine.plan()
    return engine.commit(plan, [token] * len(plan.sampled))


def replies(committed: Committed) -> list[SessionTokens]:
    return [reply for batch in committed.replies.values() for reply in batch]


def run_out(engine: Scheduler, token: int = 5) -> list[SessionTokens]:
    """Until every session has ended."""
    said: list[SessionTokens] = []
    while engine.has_work:
        said += replies(run_step(engine, token))
    return said


def planned(engine: Scheduler) -> list[tuple[str, list[int]]]:
    """The positions that the next step would compute; leaves no trace."""
    plan = engine.plan()
    positions = [plan.batch.position_T[plan.batch.sequence_T == i] for i in range(len(plan.chunks))]
    result = [
        (str(c.sequence.session), p.tolist()) for c, p in zip(plan.chunks, positions, strict=True)
    ]
    engine.abandon(plan)
    return result


def warm(engine: Scheduler, tokens: tuple[int, ...], token: int = 5, max_tokens: int = 1) -> None:
    engine.submit(origin(), submit("warm", tokens, max_tokens=max_tokens))
    run_out(engine, token)


@pytest.mark.parametrize(
    ("cached", "prompt", "first"),
    [
        (LONG, LONG, 16),  # the last token is always computed, and its block with it
        (LONG, (*LONG, 21), 20),
        (LONG[:11], LONG, 8),  # only full blocks
        (LONG, (*LONG[:6], 9, 9, 9), 4),
        (LONG, (9, *LONG[1:]), 0),
        (LONG[:3], LONG[:3], 0),
    ],
)
def test_a_prompt_begins_after_its_longest_cached_prefix(
    cached: tuple[int, ...], prompt: tuple[int, ...], first: int
) -> None:
    engine = scheduler()
    warm(engine, cached)
    engine.submit(origin(), submit("s", prompt))
    ((_, positions),) = planned(engine)
    assert positions[0] == first
    assert replies(run_step(engine))[0].cached_tokens == first if len(prompt) - first <= 8 else True


def test_generated_tokens_are_cached_too() -> None:
    engine = scheduler()
    warm(engine, LONG[:6], token=7, max_tokens=7)  # the last token's KV is never computed
    engine.submit(origin(), submit("next turn", (*LONG[:6], *[7] * 7, 1)))
    assert planned(engine) == [("next turn", [12, 13])]


def test_without_the_cache_everything_is_computed() -> None:
    engine = scheduler(prefix_cache=False)
    warm(engine, LONG)
    engine.submit(origin(), submit("s", LONG))
    assert planned(engine) == [("s", [*range(8)])]
    assert engine.load().kv_blocks_cached == 0


def test_an_abandoned_step_puts_nothing_into_the_cache() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("s", LONG))
    engine.abandon(engine.plan())
    assert engine.load().kv_blocks_cached == 0
    engine.cancel(SessionId("s"), Attempt(0))
    engine.submit(origin(), submit("t", LONG))
    assert planned(engine) == [("t", [*range(8)])]


def test_an_abandoned_admission_gives_the_cached_blocks_back() -> None:
    engine = scheduler()
    warm(engine, LONG)
    engine.submit(origin(), submit("s", LONG))
    before = engine.load()
    assert planned(engine) == planned(engine) == [("s", [16, 17, 18, 19])]
    assert engine.load() == before


def test_shared_blocks_need_no_room_of_their_own() -> None:
    engine = scheduler(kv_blocks=8, context_tokens_max=32)
    engine.submit(origin(), submit("a", LONG))
    for _ in range(3):
        run_step(engine)
    engine.submit(origin(), submit("other", LONG[::-1]))
    assert [session for session, _ in planned(engine)] == ["a"]
    engine.cancel(SessionId("other"), Attempt(0))
    engine.submit(origin(), submit("b", LONG))
    assert planned(engine) == [("a", [20]), ("b", [16, 17, 18, 19])]


def test_choices_of_one_prompt_submitted_together_cost_one_prefill() -> None:
    engine = scheduler()
    for session in "abc":
        engine.submit(origin(), submit(session, LONG, max_tokens=1))
    num_computed = 0
    cached = []
    while engine.has_work:
        plan = engine.plan()
        num_computed += plan.batch.num_tokens
        cached += [r.cached_tokens for r in replies(engine.commit(plan, [5] * len(plan.sampled)))]
    assert num_computed == 20 + 4 + 4
    assert cached == [0, 16, 16]


def test_who_waits_for_a_block_of_another_keeps_nobody_behind_it_waiting() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("a", LONG))
    engine.submit(origin(), submit("same", LONG))
    engine.submit(origin(), submit("other", LONG[::-1]))
    assert [session for session, _ in planned(engine)] == ["a", "other"]


def test_the_room_of_who_waits_for_a_block_is_kept_for_it() -> None:
    engine = scheduler(kv_blocks=12, context_tokens_max=48)
    engine.submit(origin(), submit("a", LONG))
    engine.submit(origin(), submit("same", LONG))
    engine.submit(origin(), submit("other", LONG[::-1]))
    assert [session for session, _ in planned(engine)] == ["a"]


def test_nobody_waits_for_a_block_of_one_that_goes_after_it() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("fresh", LONG))
    run_step(engine)
    engine.submit(origin(), submit("moved", LONG, num_emitted=1))
    assert [session for session, _ in planned(engine)] == ["moved", "fresh"]


def test_a_session_that_waits_for_a_block_goes_on_when_the_other_is_gone() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("a", LONG))
    engine.submit(origin(), submit("b", LONG))
    run_step(engine)
    assert [session for session, _ in planned(engine)] == ["a"]
    engine.cancel(SessionId("a"), Attempt(0))
    assert planned(engine) == [("b", [*range(8, 16)])]


def test_two_that_computed_the_same_share_it_afterwards() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("a", LONG))
    run_step(engine)
    engine.submit(origin(), submit("moved", LONG, num_emitted=1))
    while engine.load().kv_blocks_cached < 5:
        run_step(engine)
    load = engine.load()
    assert load.running == 2
    assert load.kv_blocks - load.kv_blocks_free <= 7


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("s", LONG))
    for _ in range(4):
        run_step(engine)
    engine._stop_running(engine._running.pop())
    assert planned(engine) == [("s", [20, 21])]


def test_its_own_blocks_after_a_preemption_are_not_the_sessions_cached_tokens() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("s", LONG))
    run_step(engine)
    engine._stop_running(engine._running.pop())
    reply = next(reply for _ in range(3) for reply in replies(run_step(engine)))
    assert (reply.index, reply.cached_tokens) == (0, 0)


def test_cached_tokens_are_told_once() -> None:
    engine = scheduler()
    warm(engine, LONG)
    engine.submit(origin(), submit("s", LONG, num_emitted=2, max_tokens=5))
    assert [reply.cached_tokens for reply in run_out(engine)] == [16, 0, 0]


def test_load_counts_what_was_asked_for_and_what_was_there() -> None:
    engine = scheduler()
    warm(engine, LONG)
    warm(engine, LONG)
    load = engine.load()
    assert (load.prefix_tokens, load.prefix_tokens_cached) == (40, 16)
    assert load.kv_blocks_cached == 5
    assert load.kv_blocks_free == load.kv_blocks
