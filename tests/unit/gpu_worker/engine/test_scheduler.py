"""The scheduler: every event in every state of a sequence, and the order of things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpu_worker.engine.sampler import NO_TOKEN
from gpu_worker.engine.scheduler import Committed, Scheduler
from gpu_worker.engine.sequence import SequenceState
from gpu_worker.engine.step_plan import StepPlan
from shared.types import Attempt, FinishReason, SessionId, ThinkingBudget
from shared.wire import SessionTokens
from tests.unit.gpu_worker.engine.toy import EOS, VOCAB, origin, scheduler, submit

LONG = tuple(range(1, 21))


def run_step(engine: Scheduler, token: int = 5) -> Committed:
    plan = engine.plan()
    return engine.commit(plan, [token] * len(plan.sampled))


def replies(committed: Committed) -> list[SessionTokens]:
    return [reply for batch in committed.replies.values() for reply in batch]


def planned(engine: Scheduler) -> list[tuple[str, int]]:
    """What the next step would run; leaves no trace."""
    plan = engine.plan()
    result = [(c.sequence.session, c.num_tokens) for c in plan.chunks]
    engine.abandon(plan)
    return result


def put_waiting(engine: Scheduler) -> None:
    engine.submit(origin(), submit("s", LONG))


def put_prefilling(engine: Scheduler) -> None:
    put_waiting(engine)
    run_step(engine)


def put_decoding(engine: Scheduler) -> None:
    put_waiting(engine)
    for _ in range(3):
        run_step(engine)


def put_preempted(engine: Scheduler) -> None:
    """In mid-stream, and without blocks."""
    put_decoding(engine)
    plan = engine.plan()
    engine.commit(plan, [5])
    engine._stop_running(engine._running.pop())


IN_ANY_STATE = pytest.mark.parametrize(
    "put", [put_waiting, put_prefilling, put_decoding, put_preempted]
)
Put = Callable[[Scheduler], None]


def is_empty(engine: Scheduler) -> bool:
    load = engine.load()
    return (
        not engine.has_work
        and (load.running, load.waiting, load.tokens) == (0, 0, 0)
        and load.kv_blocks_free == load.kv_blocks
    )


# every event in every state


@IN_ANY_STATE
def test_cancel_ends_the_attempt_frees_its_blocks_and_says_so(put: Put) -> None:
    engine = scheduler()
    put(engine)
    ended = engine.cancel(SessionId("s"), Attempt(0))
    assert ended is not None
    assert ended[0] == origin()
    assert ended[1].finish is FinishReason.CANCELLED
    assert is_empty(engine)


@IN_ANY_STATE
def test_cancel_of_a_later_attempt_ends_the_earlier_one(put: Put) -> None:
    engine = scheduler()
    put(engine)
    assert engine.cancel(SessionId("s"), Attempt(1)) is not None
    assert is_empty(engine)


@IN_ANY_STATE
def test_a_late_cancel_of_an_earlier_attempt_is_harmless(put: Put) -> None:
    engine = scheduler()
    put(engine)
    engine.submit(origin(2), submit("s", LONG, attempt=2))
    assert engine.cancel(SessionId("s"), Attempt(1)) is None
    assert engine.has_work


def test_cancel_of_an_unknown_session_is_nothing() -> None:
    assert scheduler().cancel(SessionId("s"), Attempt(0)) is None


@IN_ANY_STATE
def test_dropping_an_origin_ends_its_sessions_alone(put: Put) -> None:
    engine = scheduler()
    put(engine)
    engine.submit(origin(2), submit("other"))
    engine.drop_origin(origin(1))
    assert [session for session, _ in planned(engine)] == ["other"]
    engine.drop_origin(origin(2))
    assert is_empty(engine)


@IN_ANY_STATE
def test_a_later_attempt_replaces_the_earlier_and_its_origin(put: Put) -> None:
    engine = scheduler()
    put(engine)
    engine.submit(origin(2), submit("s", (1, 2), attempt=1))
    engine.drop_origin(origin(1))
    committed = run_step(engine)
    assert list(committed.replies) == [origin(2)]
    assert [r.attempt for r in replies(committed)] == [1]
    load = engine.load()
    assert (load.running, load.waiting, load.tokens) == (1, 0, 3)


@IN_ANY_STATE
def test_a_late_copy_of_a_submit_changes_nothing(put: Put) -> None:
    engine = scheduler()
    put(engine)
    before = engine.load(), planned(engine)
    assert engine.submit(origin(2), submit("s", (1, 2))) is None
    assert (engine.load(), planned(engine)) == before


@IN_ANY_STATE
def test_abandon_leaves_everything_as_before_the_plan(put: Put) -> None:
    engine = scheduler(kv_block_tokens=1, kv_blocks=64)
    put(engine)
    before = engine.load()
    plan = engine.plan()
    states = [(c.sequence.state, c.sequence.num_computed) for c in plan.chunks]
    engine.abandon(plan)
    assert engine.load() == before
    again = engine.plan()
    assert [(c.sequence.state, c.sequence.num_computed) for c in again.chunks] == states
    assert [c.num_tokens for c in again.chunks] == [c.num_tokens for c in plan.chunks]
    assert again.batch.position_T.tolist() == plan.batch.position_T.tolist()


@IN_ANY_STATE
def test_plans_are_committed_in_their_order_and_abandoned_in_reverse(put: Put) -> None:
    engine = scheduler()
    put(engine)
    engine.submit(origin(), submit("other", max_tokens=9))
    engine.plan()
    with pytest.raises(AssertionError):
        engine.plan()
    later = engine.plan_ahead()
    assert later is not None
    with pytest.raises(AssertionError):
        engine.commit(later, [5] * len(later.sampled))


# planning ahead


def put_ahead(engine: Scheduler) -> tuple[StepPlan, StepPlan]:
    """The session s decodes; a step of it is in flight, and one more after that."""
    put_decoding(engine)
    first = engine.plan()
    later = engine.plan_ahead()
    assert later is not None
    return first, later


def test_a_token_in_flight_is_named_by_its_place() -> None:
    engine = scheduler()
    first, later = put_ahead(engine)
    (position,) = first.batch.position_T
    assert later.batch.token_ids_T.tolist() == [-1]
    assert later.batch.position_T.tolist() == [position + 1]
    assert [d.position for d in later.draws] == [first.draws[0].position + 1]
    assert [r.ids for r in replies(engine.commit(first, [7]))] == [(7,)]
    assert [r.ids for r in replies(engine.commit(later, [8]))] == [(8,)]
    assert engine.plan().batch.token_ids_T.tolist() == [8]


def test_what_is_known_of_a_prompt_is_planned_ahead_and_so_is_who_comes_meanwhile() -> None:
    engine = scheduler()
    put_waiting(engine)
    engine.plan()
    engine.submit(origin(), submit("new", (1, 2, 3)))
    later = engine.plan_ahead()
    assert later is not None
    assert [(c.sequence.session, c.num_tokens) for c in later.chunks] == [("s", 8), ("new", 3)]
    assert later.batch.token_ids_T.tolist() == [*LONG[8:16], 1, 2, 3]


def test_nothing_is_planned_beyond_the_last_token() -> None:
    engine = scheduler()
    engine.submit(origin(), submit(max_tokens=2))
    run_step(engine)
    engine.plan()
    assert engine.plan_ahead() is None


@pytest.mark.parametrize(
    "sampling",
    [
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"prompt_logprobs": 0},
        {"bad_words": ((1, 2),)},
        {
            "thinking_budget": ThinkingBudget(
                tokens=3, opened=True, start_ids=(), end_ids=(1,), forced_ids=(1,)
            )
        },
    ],
)
def test_what_hangs_on_tokens_waits_for_them(sampling: dict[str, Any]) -> None:
    engine = scheduler()
    engine.submit(origin(), submit(**sampling))
    engine.plan()
    assert engine.plan_ahead() is None


def test_nobody_is_preempted_for_a_step_ahead() -> None:
    engine = scheduler(kv_block_tokens=1, kv_blocks=8)
    engine.submit(origin(), submit("a", (1, 2, 3), max_tokens=5))
    engine.submit(origin(), submit("b", (9, 8), max_tokens=5))
    run_step(engine)
    plan = engine.plan()
    before = engine.load()
    assert engine.plan_ahead() is None
    assert engine.load() == before
    assert [r.ids for r in replies(engine.commit(plan, [5, 6]))] == [(5,), (6,)]


def test_an_end_token_makes_the_step_ahead_void_for_its_sequence() -> None:
    engine = scheduler(kv_block_tokens=1)
    engine.submit(origin(), submit("s", ignore_eos=False))
    engine.submit(origin(), submit("other"))
    run_step(engine)
    first = engine.plan()
    later = engine.plan_ahead()
    assert later is not None
    row = next(i for i, s in enumerate(first.sampled) if s.session == "s")
    engine.commit(first, [EOS if i == row else 5 for i in range(2)])
    committed = engine.commit(later, [6, 6])
    assert [(r.session, r.ids) for r in replies(committed)] == [("other", (6,))]
    assert committed.num_generated == 1
    engine.cancel(SessionId("other"), Attempt(0))
    assert is_empty(engine)


@pytest.mark.parametrize("abandoned", [False, True])
def test_who_is_cancelled_in_flight_gets_nothing_and_leaves_nothing(abandoned: bool) -> None:
    engine = scheduler(kv_block_tokens=1)
    first, later = put_ahead(engine)
    assert engine.cancel(SessionId("s"), Attempt(0)) is not None
    assert is_empty(engine)
    if abandoned:
        engine.abandon(later)
        engine.abandon(first)
    else:
        assert engine.commit(first, [5]) == engine.commit(later, [5]) == Committed({}, 0, 0)
    assert is_empty(engine)


def test_an_empty_plan_is_a_step_without_tokens() -> None:
    engine = scheduler()
    plan = engine.plan()
    assert plan.batch.num_tokens == 0
    assert plan.batch.block_tables_SB.shape == (0, 0)
    assert engine.commit(plan, []) == Committed({}, 0, 0)
    engine.abandon(engine.plan())


# the end of a session


def test_max_tokens_counts_the_whole_session() -> None:
    engine = scheduler()
    engine.submit(origin(), submit(tokens=(1, 2, 3, 4, 5), num_emitted=3, max_tokens=5))
    first, last = replies(run_step(engine))[0], replies(run_step(engine))[0]
    assert (first.index, first.ids, first.finish) == (3, (5,), None)
    assert (last.index, last.finish) == (4, FinishReason.LENGTH)
    assert is_empty(engine)


def test_the_stop_token_is_sent_with_the_finish() -> None:
    engine = scheduler()
    engine.submit(origin(), submit(ignore_eos=False))
    (reply,) = replies(run_step(engine, EOS))
    assert (reply.ids, reply.finish) == ((EOS,), FinishReason.STOP)
    assert is_empty(engine)


def test_stop_token_ids_hold_even_where_eos_is_ignored() -> None:
    engine = scheduler()
    engine.submit(origin(), submit(stop_token_ids=(9,)))
    assert replies(run_step(engine, EOS))[0].finish is None
    assert replies(run_step(engine, 9))[0].finish is FinishReason.STOP


def test_a_stop_token_that_is_also_the_last_allowed_finishes_as_stop() -> None:
    engine = scheduler()
    engine.submit(origin(), submit(ignore_eos=False, max_tokens=1))
    assert replies(run_step(engine, EOS))[0].finish is FinishReason.STOP


def test_stop_tokens_are_banned_until_min_tokens_of_the_session() -> None:
    engine = scheduler()
    engine.submit(
        origin(),
        submit(num_emitted=1, min_tokens=3, ignore_eos=False, stop_token_ids=(9,)),
    )
    banned = []
    for _ in range(3):
        plan = engine.plan()
        banned.append(plan.draws[0].banned)
        engine.commit(plan, [5])
    assert banned == [(EOS, 9), (EOS, 9), ()]


def test_an_ignored_eos_is_not_banned() -> None:
    engine = scheduler()
    engine.submit(origin(), submit(min_tokens=3))
    assert engine.plan().draws[0].banned == ()


@pytest.mark.parametrize("changes", [{"context_tokens_max": 5}, {"kv_blocks": 5}])
def test_the_end_of_the_context_or_of_the_cache_finishes_as_length(
    changes: dict[str, int],
) -> None:
    engine = scheduler(kv_block_tokens=1, **changes)
    engine.submit(origin(), submit(tokens=(1, 2, 3), max_tokens=50))
    assert replies(run_step(engine))[0].finish is None
    assert replies(run_step(engine))[0].finish is FinishReason.LENGTH
    assert is_empty(engine)


@pytest.mark.parametrize(
    ("tokens", "num_emitted", "max_tokens"), [((1, 2, 3), 2, 2), ((1,) * 64, 9, 50)]
)
def test_a_continuation_with_nothing_left_finishes_at_once(
    tokens: tuple[int, ...], num_emitted: int, max_tokens: int
) -> None:
    engine = scheduler()
    reply = engine.submit(
        origin(), submit(tokens=tokens, num_emitted=num_emitted, max_tokens=max_tokens)
    )
    assert reply is not None
    assert (reply.finish, reply.index, reply.ids) == (FinishReason.LENGTH, num_emitted, ())
    assert is_empty(engine)


def test_a_row_without_a_token_fails_its_session_alone() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("bad"))
    engine.submit(origin(), submit("good"))
    plan = engine.plan()
    bad, good = replies(engine.commit(plan, [NO_TOKEN, 5]))
    assert bad.error is not None
    assert not bad.retryable
    assert good.ids == (5,)
    assert engine.load().running == 1


# refusals


@pytest.mark.parametrize(
    "tokens", [(), (1,) * 64, (1, VOCAB), (-1, 2)], ids=["empty", "long", "beyond", "negative"]
)
def test_a_prompt_that_can_never_be_served_is_refused_for_good(tokens: tuple[int, ...]) -> None:
    engine = scheduler()
    reply = engine.submit(origin(), submit(tokens=tokens))
    assert reply is not None
    assert reply.error
    assert not reply.retryable
    assert is_empty(engine)


def test_a_full_queue_refuses_and_says_that_another_rank_may_take_it() -> None:
    engine = scheduler(waiting_max=2)
    assert engine.submit(origin(), submit("a")) is None
    assert engine.submit(origin(), submit("b")) is None
    refused = engine.submit(origin(), submit("c"))
    assert refused is not None
    assert refused.retryable
    assert refused.error
    assert engine.load().waiting == 2


def test_fresh_sessions_in_the_queue_do_not_refuse_one_in_mid_stream() -> None:
    engine = scheduler(waiting_max=1)
    engine.submit(origin(), submit("fresh"))
    assert engine.submit(origin(), submit("moved", num_emitted=1)) is None
    assert engine.submit(origin(), submit("moved too", num_emitted=1)) is not None


# order, chunks and blocks


def test_sessions_in_mid_stream_go_first_then_those_that_came_first() -> None:
    engine = scheduler()
    for session, num_emitted in (("a", 0), ("b", 0), ("moved", 2), ("moved too", 1)):
        engine.submit(origin(), submit(session, num_emitted=num_emitted))
    assert [session for session, _ in planned(engine)] == ["moved", "moved too", "a", "b"]


def test_a_moved_session_overtakes_a_fresh_one_that_runs_already() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("fresh", LONG))
    run_step(engine)
    engine.submit(origin(), submit("moved", LONG[::-1], num_emitted=1))
    run_step(engine)
    assert planned(engine) == [("moved", 8), ("fresh", 4)]


def test_an_abandoned_admission_lets_a_moved_session_go_first() -> None:
    engine = scheduler(running_max=1)
    engine.submit(origin(), submit("fresh"))
    assert planned(engine) == [("fresh", 3)]
    engine.submit(origin(), submit("moved", num_emitted=1))
    assert planned(engine) == [("moved", 3)]


def test_decodes_come_first_and_chunks_fill_the_rest_of_the_step() -> None:
    engine = scheduler(step_tokens_max=10, prefill_chunk_tokens=6)
    engine.submit(origin(), submit("a"))
    run_step(engine)
    engine.submit(origin(), submit("b", LONG))
    engine.submit(origin(), submit("c", LONG[::-1]))
    engine.submit(origin(), submit("d", LONG[1:]))
    assert planned(engine) == [("a", 1), ("b", 6), ("c", 3)]
    run_step(engine)
    assert planned(engine) == [("a", 1), ("b", 6), ("c", 3)]


def test_a_chunk_wants_logits_only_where_it_reaches_the_last_known_token() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("a", LONG))
    wanted = []
    for _ in range(4):
        plan = engine.plan()
        wanted.append((plan.batch.num_tokens, plan.batch.logits_rows_R.tolist()))
        engine.commit(plan, [5] * len(plan.sampled))
    assert wanted == [(8, []), (8, []), (4, [3]), (1, [0])]


def test_running_sequences_are_bounded() -> None:
    engine = scheduler(running_max=2)
    for session in "abc":
        engine.submit(origin(), submit(session))
    run_step(engine)
    load = engine.load()
    assert (load.running, load.waiting) == (2, 1)


def test_moved_sessions_run_beyond_the_limit_for_new_ones() -> None:
    engine = scheduler(running_max=2, step_tokens_max=8, kv_blocks=64)
    for number in range(2):
        engine.submit(origin(), submit(f"own-{number}", (number + 1,) * 3))
        run_step(engine)
    engine.submit(origin(), submit("new", (9, 9, 9)))
    for number in range(5):
        engine.submit(origin(), submit(f"moved-{number}", (9, 8, number), num_emitted=1))
    for _ in range(3):
        run_step(engine)
    load = engine.load()
    assert (load.running, load.waiting) == (7, 1), "only the new one waits"


def test_steps_hold_the_decodes_of_all_moved_sessions_that_run() -> None:
    engine = scheduler(running_max=2, step_tokens_max=4, kv_blocks=64)
    for number in range(6):
        engine.submit(origin(), submit(f"moved-{number}", (9, 8, number), num_emitted=1))
    while engine.has_work:
        assert engine.load().running <= 4
        run_step(engine)


def test_a_moved_session_takes_blocks_from_one_whose_client_has_seen_nothing() -> None:
    engine = scheduler(kv_blocks=8, kv_block_tokens=4, prefill_chunk_tokens=4)
    engine.submit(origin(), submit("fresh", (1,) * 22))
    run_step(engine)
    engine.submit(origin(), submit("moved", (2,) * 12, num_emitted=4, max_tokens=8))
    assert planned(engine) == [("moved", 4)]
    ended = [r.session for _ in range(60) if engine.has_work for r in replies(run_step(engine))]
    assert set(ended) == {"fresh", "moved"}
    assert is_empty(engine)


def test_a_moved_session_takes_no_blocks_from_one_in_mid_stream() -> None:
    engine = scheduler(kv_blocks=8, kv_block_tokens=4)
    engine.submit(origin(), submit("own", (1,) * 8, max_tokens=12))
    run_step(engine)
    engine.submit(origin(), submit("moved", (2,) * 24, num_emitted=4, max_tokens=8))
    assert planned(engine) == [("own", 1)]


def test_no_step_is_planned_ahead_while_blocks_are_owed_to_a_moved_session() -> None:
    engine = scheduler(kv_blocks=8, kv_block_tokens=4, prefill_chunk_tokens=4)
    engine.submit(origin(), submit("fresh", (1,) * 22))
    plan = engine.plan()
    engine.submit(origin(), submit("moved", (2,) * 12, num_emitted=4, max_tokens=8))
    assert engine.plan_ahead() is None
    engine.commit(plan, [])
    assert planned(engine) == [("moved", 4)]


def test_admission_leaves_each_running_sequence_a_block_to_grow() -> None:
    engine = scheduler(kv_blocks=4, kv_block_tokens=4, context_tokens_max=16)
    engine.submit(origin(), submit("a", (1,) * 7))
    run_step(engine)
    engine.submit(origin(), submit("b", (2,) * 8))
    assert planned(engine) == [("a", 1)]
    engine.cancel(SessionId("b"), Attempt(0))
    engine.submit(origin(), submit("c", (2,) * 4))
    assert planned(engine) == [("a", 1), ("c", 4)]


def test_when_blocks_run_out_the_youngest_gives_up_its_own_and_comes_back() -> None:
    engine = scheduler(kv_blocks=6, kv_block_tokens=2, context_tokens_max=12)
    engine.submit(origin(), submit("old", (1, 2), max_tokens=9))
    engine.submit(origin(), submit("young", (3, 4), max_tokens=9))
    seen: dict[str, list[int]] = {"old": [], "young": []}
    waits = 0
    while engine.has_work:
        committed = run_step(engine)
        waits += engine.load().waiting
        for reply in replies(committed):
            assert reply.error is None
            seen[reply.session].append(reply.index)
    assert waits > 0
    assert seen == {"old": list(range(9)), "young": list(range(9))}
    assert is_empty(engine)


def test_a_preemption_in_an_abandoned_step_stays_and_loses_no_token() -> None:
    engine = scheduler(kv_blocks=4, kv_block_tokens=2, context_tokens_max=8)
    engine.submit(origin(), submit("old", (1, 2), max_tokens=6))
    engine.submit(origin(), submit("young", (1, 2), max_tokens=6))
    young = next(s for s in engine._waiting.in_order() if s.session == "young")
    while young.state is not SequenceState.RUNNING or engine.load().kv_blocks_free:
        run_step(engine)
    while young.state is SequenceState.RUNNING:
        known = list(young.tokens)
        engine.abandon(engine.plan())
        if young.state is SequenceState.RUNNING:
            run_step(engine)
    assert young.tokens == known
    assert (young.num_computed, engine.load().waiting) == (0, 1)


def test_load_counts_known_tokens_of_all_sequences() -> None:
    engine = scheduler(running_max=1)
    engine.submit(origin(), submit("a", (1, 2, 3)))
    engine.submit(origin(), submit("b", (1, 2)))
    run_step(engine)
    load = engine.load()
    assert (load.running, load.waiting, load.tokens) == (1, 1, 6)
    assert load.kv_blocks - load.kv_blocks_free == 1


def test_prefilled_tokens_of_moved_sessions_are_counted_once() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("moved", LONG, num_emitted=4))
    engine.submit(origin(), submit("fresh", (1, 2)))
    assert sum(run_step(engine).num_reprefilled for _ in range(6)) == len(LONG)


def test_replies_are_grouped_by_origin() -> None:
    engine = scheduler()
    engine.submit(origin(1), submit("a"))
    engine.submit(origin(2), submit("b"))
    engine.submit(origin(1), submit("c"))
    grouped = {o: [r.session for r in batch] for o, batch in run_step(engine).replies.items()}
    assert grouped == {origin(1): ["a", "c"], origin(2): ["b"]}
