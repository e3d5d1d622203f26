"""Sessions that outlive their gateway: who may take one over gets exactly the tokens that it would
have had, and nobody else does."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.sequence import Origin
from shared.types import FinishReason, SchedulingParams
from shared.wire import SessionTokens, Submit
from tests.unit.gpu_worker.engine.toy import origin, scheduler, submit

KEY = b"k" * 16
PROMPT = (3, 4, 5)
DEAD, ALIVE = origin(1), origin(2)


def streamed(session: str = "old/1", key: bytes = KEY, tenant: str = "a", **changes: int) -> Submit:
    scheduling = SchedulingParams(tenant=tenant)
    return replace(submit(session, PROMPT, **changes), stream_key=key, scheduling=scheduling)


def run_step(engine: Scheduler, token: int) -> list[SessionTokens]:
    plan = engine.plan()
    committed = engine.commit(plan, [token] * len(plan.sampled))
    return [reply for batch in committed.replies.values() for reply in batch]


def running(tokens: int = 3, **changes: int) -> Scheduler:
    """A session of the gateway DEAD that has had the tokens 7, 8, …"""
    engine = scheduler()
    assert engine.submit(DEAD, streamed(**changes)) is None
    for number in range(tokens):
        run_step(engine, 7 + number)
    return engine


def take(engine: Scheduler, wanted: Submit, by: Origin = ALIVE) -> SessionTokens:
    replies = engine.take_over(by, wanted)
    assert replies is not None
    to, reply = replies[-1]
    assert to == by
    return reply


def test_an_orphan_goes_on_and_gives_all_its_tokens_to_who_takes_it_over() -> None:
    engine = running()
    engine.orphan_origin(DEAD)
    run_step(engine, 10)
    taken = take(engine, streamed("new/5"))
    assert (taken.session, taken.index, taken.ids) == ("new/5", 0, (7, 8, 9, 10))
    assert taken.finish is None
    (reply,) = run_step(engine, 11)
    assert (reply.session, reply.attempt, reply.index, reply.ids) == ("new/5", 0, 4, (11,))
    engine.drop_origin(DEAD)
    assert engine.load().running == 1


def test_only_what_is_asked_for_is_said() -> None:
    engine = running()
    engine.orphan_origin(DEAD)
    wanted = replace(streamed("new/5"), tokens=(*PROMPT, 7, 8), num_emitted=2)
    taken = take(engine, wanted)
    assert (taken.index, taken.ids) == (2, (9,))


def test_an_orphan_that_ends_keeps_its_tokens_until_it_is_dropped() -> None:
    engine = running(max_tokens=4)
    engine.orphan_origin(DEAD)
    run_step(engine, 10)
    assert not engine.has_work
    for session in ("new/5", "newer/1"):
        taken = take(engine, streamed(session, max_tokens=4))
        assert (taken.session, taken.ids) == (session, (7, 8, 9, 10))
        assert taken.finish is FinishReason.LENGTH
    engine.drop_origin(DEAD)
    assert engine.take_over(ALIVE, streamed("new/6", max_tokens=4)) is None


def test_nobody_waits_for_an_orphan_longer_than_it_is_kept() -> None:
    engine = running()
    engine.orphan_origin(DEAD)
    engine.drop_origin(DEAD)
    assert not engine.has_work
    assert engine.load().kv_blocks_free == engine.load().kv_blocks
    assert engine.take_over(ALIVE, streamed("new/5")) is None


@pytest.mark.parametrize(
    "wanted",
    [
        streamed("new/5", key=b"other key"),
        streamed("new/5", key=b""),
        streamed("new/5", tenant="b"),
        streamed("new/5", max_tokens=7),
        replace(streamed("new/5"), tokens=(3, 4, 6)),
        replace(streamed("new/5"), tokens=(3, 4, 5, 6), num_emitted=1),
        replace(streamed("new/5"), tokens=(3, 4, 5, 7)),  # as a prompt
    ],
)
def test_who_asks_for_something_else_gets_nothing(wanted: Submit) -> None:
    engine = running()
    engine.orphan_origin(DEAD)
    assert engine.take_over(ALIVE, wanted) is None


def test_a_stream_without_a_key_or_a_token_ends_with_its_gateway() -> None:
    engine = running(0)
    engine.submit(DEAD, streamed("old/2", key=b""))
    run_step(engine, 7)
    engine.submit(DEAD, streamed("old/3", key=b"other"))
    engine.orphan_origin(DEAD)
    assert [c.sequence.session for c in engine.plan().chunks] == ["old/1"]


def test_log_probabilities_are_not_kept() -> None:
    engine = scheduler()
    sampling = msgspec.structs.replace(streamed().sampling, logprobs=0)
    engine.submit(DEAD, replace(streamed(), sampling=sampling))
    plan = engine.plan()
    engine.commit(plan, [7] * len(plan.sampled))
    engine.orphan_origin(DEAD)
    assert not engine.has_work


def test_a_gateway_whose_client_has_gone_elsewhere_loses_the_session() -> None:
    engine = running()
    replies = engine.take_over(ALIVE, streamed("new/5"))
    assert replies is not None
    (to, lost), (_, taken) = replies
    assert (to, lost.session, lost.retryable) == (DEAD, "old/1", False)
    assert lost.error == "its client has gone on with this stream over another connection"
    assert taken.ids == (7, 8, 9)
    assert engine.cancel(lost.session, lost.attempt) is None
    engine.orphan_origin(DEAD)
    engine.drop_origin(DEAD)
    assert engine.load().running == 1
    assert engine.cancel(taken.session, taken.attempt) is not None
    assert not engine.has_work


def test_its_own_gateway_takes_an_orphan_back_and_replaces_what_is_its_own() -> None:
    """After a broken link it finds the session as it was; without one it wants a new attempt."""
    engine = running()
    again = replace(streamed(), attempt=streamed(attempt=1).attempt)
    assert engine.take_over(DEAD, again) is None
    engine.orphan_origin(DEAD)
    assert take(engine, again).attempt == 1


def test_an_orphan_that_is_taken_over_may_be_orphaned_again() -> None:
    engine = running()
    engine.orphan_origin(DEAD)
    take(engine, streamed("new/5"))
    engine.orphan_origin(ALIVE)
    engine.drop_origin(DEAD)
    run_step(engine, 10)
    assert take(engine, streamed("newer/1"), by=origin(3)).ids == (7, 8, 9, 10)
    engine.drop_origin(ALIVE)
    assert engine.load().running == 1


def test_too_many_orphans_end_the_oldest_of_the_tenant_that_has_most() -> None:
    engine = scheduler(orphans_max=2)
    for number, tenant in enumerate("baa"):
        engine.submit(DEAD, streamed(f"old/{number}", bytes([number]), tenant))
    run_step(engine, 7)
    engine.orphan_origin(DEAD)
    assert engine.take_over(ALIVE, streamed("new/1", b"\1", "a")) is None
    assert engine.take_over(ALIVE, streamed("new/0", b"\0", "b")) is not None
    assert engine.take_over(ALIVE, streamed("new/2", b"\2", "a")) is not None
    assert engine.load().running == 2
