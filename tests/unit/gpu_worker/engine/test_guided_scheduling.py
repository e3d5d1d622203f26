"""Steps never wait for a grammar: a sequence whose grammar or mask is not there yet is in none, and
the others go on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_worker.engine.scheduler import Scheduler
from shared.types import FinishReason, SchedulingParams, SessionId
from shared.wire import SessionTokens, Submit
from tests.unit.gpu_worker.engine.hand_grammars import HandGrammars
from tests.unit.gpu_worker.engine.toy import EOS, limits, origin, submit


@pytest.fixture
def grammars() -> HandGrammars:
    return HandGrammars()


@pytest.fixture
def engine(grammars: HandGrammars) -> Scheduler:
    return Scheduler(limits(), (EOS,), grammars)


def put(engine: Scheduler, session: str, grammar: str = "", **fields: object) -> None:
    assert engine.submit(origin(), submit(session, grammar=grammar, **fields)) is None  # type: ignore[arg-type]


def of(tenant: str, session: str, grammar: str = "", **fields: int) -> Submit:
    plain = submit(session, grammar=grammar, **fields)  # type: ignore[arg-type]
    return replace(plain, scheduling=SchedulingParams(tenant=tenant))


def step(engine: Scheduler, token: int = 5) -> dict[str, SessionTokens]:
    """Runs a step; the replies by session."""
    plan = engine.plan()
    committed = engine.commit(plan, [token] * len(plan.sampled))
    return {r.session: r for batch in committed.replies.values() for r in batch}


def settle(engine: Scheduler) -> dict[str, SessionTokens]:
    return {r.session: r for batch in engine.settle_grammars(wait=False).values() for r in batch}


def test_a_grammar_that_is_being_compiled_is_no_work_and_holds_nobody_up(
    engine: Scheduler, grammars: HandGrammars
) -> None:
    put(engine, "guided", "g")
    assert not engine.has_work
    assert engine.load().waiting == 1
    put(engine, "free")
    assert engine.has_work
    assert [set(step(engine)) for _ in range(3)] == [{"free"}] * 3
    settle(engine)
    assert set(step(engine)) == {"free"}
    grammars.opened[0].allow()
    settle(engine)
    assert set(step(engine)) == {"free", "guided"}


def test_a_sequence_sits_out_steps_until_its_mask_is_there(
    engine: Scheduler, grammars: HandGrammars
) -> None:
    put(engine, "guided", "g")
    put(engine, "free")
    matcher = grammars.opened[0]
    matcher.allow()
    settle(engine)
    assert set(step(engine, 7)) == {"free", "guided"}
    assert matcher.accepted == [7]
    settle(engine)
    assert [set(step(engine)) for _ in range(3)] == [{"free"}] * 3
    matcher.allow(4)
    settle(engine)
    plan = engine.plan()
    (draw,) = [d for d, s in zip(plan.draws, plan.sampled, strict=True) if s.matcher is not None]
    assert draw.allowed is matcher.allowed
    engine.abandon(plan)
    assert set(step(engine)) == {"free", "guided"}


def test_only_a_held_mask_is_no_work(engine: Scheduler, grammars: HandGrammars) -> None:
    put(engine, "guided", "g")
    grammars.opened[0].allow()
    settle(engine)
    step(engine)
    assert not engine.has_work
    assert not engine.plan().chunks


def test_a_moment_is_given_to_masks_alone(engine: Scheduler, grammars: HandGrammars) -> None:
    put(engine, "guided", "g")
    engine.settle_grammars(wait=True)
    assert grammars.num_waits == 0, "compiling takes longer than a moment"
    grammars.opened[0].allow()
    engine.settle_grammars(wait=True)
    step(engine)
    engine.settle_grammars(wait=False)
    assert grammars.num_waits == 0
    engine.settle_grammars(wait=True)
    assert grammars.num_waits == 1


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_grammar_that_cannot_be_followed_ends_its_session_as_invalid(
    engine: Scheduler, grammars: HandGrammars, num_steps: int
) -> None:
    put(engine, "guided", "g")
    put(engine, "free")
    matcher = grammars.opened[0]
    for _ in range(num_steps):
        matcher.allow()
        settle(engine)
        step(engine)
    matcher.allowed, matcher.error = None, "too long"
    (reply,) = settle(engine).values()
    assert (reply.error, reply.invalid, reply.retryable) == ("too long", True, False)
    assert reply.index == num_steps
    assert matcher.closed
    assert set(step(engine)) == {"free"}
    assert settle(engine) == {}


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_session_that_ends_closes_its_matcher(
    engine: Scheduler, grammars: HandGrammars, num_steps: int
) -> None:
    put(engine, "guided", "g")
    for _ in range(num_steps):
        grammars.opened[0].allow()
        settle(engine)
        step(engine)
    session = submit("guided")
    assert engine.cancel(SessionId("guided"), session.attempt) is not None
    assert grammars.opened[0].closed
    assert not engine.has_work
    assert settle(engine) == {}


def test_the_last_token_needs_no_mask(engine: Scheduler, grammars: HandGrammars) -> None:
    put(engine, "guided", "g", max_tokens=1)
    grammars.opened[0].allow()
    settle(engine)
    assert step(engine)["guided"].finish is FinishReason.LENGTH
    assert grammars.opened[0].accepted == []
    assert grammars.opened[0].closed


def test_its_end_token_stops_it_whatever_the_client_ignores(
    engine: Scheduler, grammars: HandGrammars
) -> None:
    put(engine, "guided", "g")
    grammars.opened[0].allow(1)
    settle(engine)
    assert step(engine, 1)["guided"].finish is FinishReason.STOP


def test_a_continuation_is_compiled_after_its_tokens(
    engine: Scheduler, grammars: HandGrammars
) -> None:
    put(engine, "guided", "g", tokens=(3, 4, 5, 6, 7), num_emitted=2)
    assert grammars.opened[0].accepted == [6, 7]


def test_grammars_that_wait_are_bounded_as_sequences_that_wait(
    engine: Scheduler, grammars: HandGrammars
) -> None:
    for number in range(8):
        put(engine, f"s{number}", "g")
    refused = engine.submit(origin(), submit("s9", grammar="g"))
    assert refused is not None
    assert refused.retryable
    assert len(grammars.opened) == 8


@pytest.mark.parametrize("grammar", ["", "g"])
def test_those_that_compile_count_in_the_part_of_their_tenant(
    grammars: HandGrammars, grammar: str
) -> None:
    engine = Scheduler(limits(waiting_max=18), (EOS,), grammars)
    num_taken = 0
    while engine.submit(origin(), of("a", f"a{num_taken}", grammar=grammar)) is None:
        num_taken += 1
    assert 0 < num_taken < 18
    assert engine.submit(origin(), of("b", "b0", grammar=grammar)) is None
    assert engine.load().waiting == num_taken + 1


def test_the_tenant_that_was_served_least_is_next_when_its_grammar_has_compiled(
    grammars: HandGrammars,
) -> None:
    engine = Scheduler(limits(running_max=1), (EOS,), grammars)
    assert engine.submit(origin(), of("b", "b0", grammar="g", max_tokens=1)) is None
    for number in range(3):
        assert engine.submit(origin(), of("a", f"a{number}", max_tokens=1)) is None
    assert set(step(engine)) == {"a0"}
    grammars.opened[0].allow()
    settle(engine)
    assert [set(step(engine)) for _ in range(3)] == [{"b0"}, {"a1"}, {"a2"}]


def test_a_tenant_has_left_when_its_grammar_could_not_be_followed(
    grammars: HandGrammars,
) -> None:
    engine = Scheduler(limits(waiting_max=18), (EOS,), grammars)
    for _ in range(3):
        assert engine.submit(origin(), of("b", "b0", grammar="g")) is None
        grammars.opened[-1].error = "too long"
        assert settle(engine)["b0"].invalid
    assert engine.load().waiting == 0
    assert engine.submit(origin(), of("b", "b1")) is None
    assert set(step(engine)) == {"b1"}


def test_a_rank_without_a_tokenizer_says_so() -> None:
    engine = Scheduler(limits(), (EOS,))
    reply = engine.submit(origin(), submit("s", grammar="g"))
    assert reply is not None
    assert reply.error is not None
    assert not engine.has_work
