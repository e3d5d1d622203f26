"""Log-probabilities: the right numbers, of the right rows, whoever asks beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_worker.engine.logprobs import score, score_step
from gpu_worker.engine.sampler import sample
from gpu_worker.engine.scheduler import Scheduler
from shared.types import Attempt, FinishReason, SessionId
from shared.wire import SessionTokens, TokenLogprob
from tests.unit.gpu_worker.engine.toy import (
    VOCAB,
    ToyModel,
    logits_after,
    origin,
    scheduler,
    submit,
)

PROMPT = tuple((7 * n + 3) % VOCAB for n in range(19))


def expected(prefix: tuple[int, ...], token: int, num_top: int) -> TokenLogprob:
    """By plain arithmetic on the toy model's logits."""
    logits = [float(x) for x in logits_after(list(prefix))]
    log_total = math.log(math.fsum(math.exp(x - max(logits)) for x in logits)) + max(logits)
    order = sorted(range(VOCAB), key=lambda i: (-logits[i], i))
    return TokenLogprob(
        logprob=logits[token] - log_total,
        rank=1 + sum(x > logits[token] for x in logits),
        top=tuple((i, logits[i] - log_total) for i in order[:num_top]),
    )


def assert_close(found: TokenLogprob, wanted: TokenLogprob) -> None:
    assert found.logprob == pytest.approx(wanted.logprob, rel=1e-12)
    assert found.rank == wanted.rank
    assert [i for i, _ in found.top] == [i for i, _ in wanted.top]
    assert [x for _, x in found.top] == pytest.approx([x for _, x in wanted.top], rel=1e-12)


def run(engine: Scheduler, model: ToyModel | None = None, steps: int = 60) -> list[SessionTokens]:
    """Until nothing is left; all replies in order."""
    model = model or ToyModel()
    replies: list[SessionTokens] = []
    for _ in range(steps):
        if not engine.has_work:
            return replies
        plan = engine.plan()
        model.write(plan.batch)
        logits_RV = model.logits(plan.batch)
        ids = sample(logits_RV, plan.draws)
        committed = engine.commit(plan, ids, score_step(plan, logits_RV, ids))
        replies += [reply for batch in committed.replies.values() for reply in batch]
    raise AssertionError("the scheduler does not come to an end")


def prompt_scores(replies: list[SessionTokens], session: str = "s") -> list[TokenLogprob]:
    scores: list[TokenLogprob] = []
    for reply in (r for r in replies if r.session == session and r.prompt_logprobs):
        assert reply.prompt_index == len(scores) + 1
        scores += reply.prompt_logprobs
    return scores


def test_a_score_is_the_log_softmax_with_rank_and_the_likeliest() -> None:
    logits = np.array([1.0, 3.0, 3.0, -np.inf, 2.0], dtype=np.float32)
    total = math.exp(1) + 2 * math.exp(3) + math.exp(2)
    found = score(logits, 4, 3)
    assert found is not None
    assert found.logprob == pytest.approx(2 - math.log(total), rel=1e-12)
    assert (found.rank, [i for i, _ in found.top]) == (3, [1, 2, 4])
    impossible = score(logits, 3, 9)
    assert impossible is not None
    assert (impossible.logprob, impossible.rank, len(impossible.top)) == (-math.inf, 5, 5)


@pytest.mark.parametrize("row", [[math.nan, 1.0], [-math.inf, -math.inf], [math.inf, 0.0]])
def test_what_has_no_finite_maximum_has_no_score(row: list[float]) -> None:
    assert score(np.array(row, dtype=np.float32), 0, 1) is None


@pytest.mark.parametrize("vocab", [7, 64, 1021])
def test_a_score_does_not_depend_on_where_the_row_lies(vocab: int) -> None:
    rows: NDArray[np.float32] = np.random.default_rng(2).normal(size=(9, vocab)).astype(np.float32)
    for n in range(9):
        assert score(rows[n], 3, 5) == score(rows[n].copy(), 3, 5)


def test_each_token_comes_with_what_the_model_alone_thought_of_it() -> None:
    engine = scheduler()
    params = {"temperature": 1.0, "seed": 5, "logit_bias": ((4, 3.0),), "repetition_penalty": 1.5}
    engine.submit(origin(), submit("s", PROMPT, logprobs=3, max_tokens=8, **params))
    engine.submit(origin(), submit("plain", PROMPT[:5], max_tokens=8))
    replies = run(engine)
    mine = [r for r in replies if r.session == "s"]
    tokens = PROMPT
    for reply in mine:
        (logprob,) = reply.logprobs
        assert_close(logprob, expected(tokens, reply.ids[0], 3))
        tokens += reply.ids
    assert len(mine) == 8
    assert all(not r.logprobs for r in replies if r.session == "plain")


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize("scored_logits_max", [1, 5 * VOCAB, 1 << 24])
def test_a_prompt_is_scored_the_same_however_it_is_cut(chunk: int, scored_logits_max: int) -> None:
    changes = {"prefill_chunk_tokens": chunk, "scored_logits_max": scored_logits_max}
    engine = scheduler(step_tokens_max=20, **changes)
    engine.submit(origin(), submit("s", PROMPT, prompt_logprobs=2, max_tokens=2))
    engine.submit(origin(), submit("t", PROMPT[::-1], prompt_logprobs=0, max_tokens=0))
    replies = run(engine)
    scores = prompt_scores(replies)
    assert len(scores) == len(PROMPT) - 1
    for n, found in enumerate(scores, start=1):
        assert_close(found, expected(PROMPT[:n], PROMPT[n], 2))
    assert len(prompt_scores(replies, "t")) == len(PROMPT) - 1
    first_token = next(n for n, r in enumerate(replies) if r.ids)
    assert all(not r.prompt_logprobs for r in replies[first_token:] if r.session == "s")


def test_the_rows_of_a_step_are_bounded() -> None:
    engine = scheduler(scored_logits_max=6 * VOCAB, step_tokens_max=32, prefill_chunk_tokens=32)
    for name in ("a", "b", "c"):
        engine.submit(origin(), submit(name, PROMPT, prompt_logprobs=0, max_tokens=0))
    most = 0
    while engine.has_work:
        plan = engine.plan()
        most = max(most, len(plan.batch.logits_rows_R))
        logits_RV = np.zeros((len(plan.batch.logits_rows_R), VOCAB), dtype=np.float32)
        engine.commit(plan, [], score_step(plan, logits_RV, []))
    assert most == 6


def test_scoring_alone_ends_with_the_last_score_and_samples_nothing() -> None:
    engine = scheduler()
    assert engine.submit(origin(), submit("s", PROMPT, prompt_logprobs=0, max_tokens=0)) is None
    replies = run(engine)
    assert [r.finish for r in replies[:-1]] == [None] * (len(replies) - 1)
    assert (replies[-1].finish, replies[-1].ids) == (FinishReason.LENGTH, ())
    assert all(not r.ids for r in replies)
    load = engine.load()
    assert load.kv_blocks_free == load.kv_blocks


def test_a_prompt_that_fills_the_context_can_be_scored_but_not_continued() -> None:
    full = tuple(n % VOCAB for n in range(64))
    engine = scheduler()
    refused = engine.submit(origin(), submit("s", full, prompt_logprobs=0, max_tokens=1))
    assert refused is not None
    assert refused.error is not None
    engine.submit(origin(), submit("s", full, attempt=1, prompt_logprobs=0, max_tokens=0))
    assert len(prompt_scores(run(engine))) == 63


@pytest.mark.parametrize("tokens", [(5,), PROMPT])
def test_where_nothing_is_to_score_or_sample_the_answer_is_at_once(tokens: tuple[int, ...]) -> None:
    asked = {"prompt_logprobs": 0} if len(tokens) == 1 else {}
    reply = scheduler().submit(origin(), submit("s", tokens, max_tokens=0, **asked))
    assert reply is not None
    assert reply.finish is FinishReason.LENGTH


def test_an_abandoned_step_is_scored_again() -> None:
    engine, model = scheduler(), ToyModel()
    engine.submit(origin(), submit("s", PROMPT, prompt_logprobs=1, max_tokens=1))
    engine.abandon(engine.plan())
    again = run(engine, model)
    assert len(prompt_scores(again)) == len(PROMPT) - 1


def test_a_preempted_prompt_goes_on_where_its_scores_end() -> None:
    engine, model = scheduler(prefill_chunk_tokens=6), ToyModel()
    engine.submit(origin(), submit("s", PROMPT, prompt_logprobs=1, max_tokens=2))
    before: list[SessionTokens] = []
    for _ in range(2):
        plan = engine.plan()
        model.write(plan.batch)
        logits_RV = model.logits(plan.batch)
        committed = engine.commit(plan, [], score_step(plan, logits_RV, []))
        before += [r for batch in committed.replies.values() for r in batch]
    engine._stop_running(engine._running.pop())
    scores = prompt_scores([*before, *run(engine, model)])
    for n, found in enumerate(scores, start=1):
        assert_close(found, expected(PROMPT[:n], PROMPT[n], 1))
    assert len(scores) == len(PROMPT) - 1


def test_a_prompt_whose_prefix_is_cached_is_scored_all_the_same() -> None:
    engine, model = scheduler(), ToyModel()
    engine.submit(origin(), submit("first", PROMPT, max_tokens=1))
    run(engine, model)
    engine.submit(origin(), submit("s", PROMPT, prompt_logprobs=0, max_tokens=1))
    assert len(prompt_scores(run(engine, model))) == len(PROMPT) - 1


def test_a_prompt_without_finite_logits_fails() -> None:
    engine = scheduler()
    engine.submit(origin(), submit("s", PROMPT[:6], prompt_logprobs=0, max_tokens=4))
    plan = engine.plan()
    logits_RV = np.zeros((len(plan.batch.logits_rows_R), VOCAB), dtype=np.float32)
    logits_RV[2] = math.nan
    ids = sample(logits_RV, plan.draws)
    committed = engine.commit(plan, ids, score_step(plan, logits_RV, ids))
    (reply,) = committed.replies[origin()]
    assert reply.error == "the model gave no finite logits"
    assert not engine.has_work


def test_a_continuation_with_penalties_draws_the_same_tokens_and_logprobs() -> None:
    params = {
        "temperature": 0.8,
        "seed": 3,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.2,
        "min_p": 0.02,
        "logprobs": 2,
        "max_tokens": 20,
    }
    engine = scheduler()
    engine.submit(origin(), submit("s", PROMPT, **params))
    whole = [(r.ids[0], r.logprobs[0]) for r in run(engine)]
    for cut in (1, 7, 19):
        other = scheduler()
        given = PROMPT + tuple(token for token, _ in whole[:cut])
        other.submit(origin(), submit("s", given, num_emitted=cut, attempt=1, **params))
        assert [(r.ids[0], r.logprobs[0]) for r in run(other)] == whole[cut:]
    assert other.cancel(SessionId("s"), Attempt(1)) is None
