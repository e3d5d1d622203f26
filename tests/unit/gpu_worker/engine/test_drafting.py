"""Drafts: they change how many steps an answer takes, and nothing that its client sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_worker.engine.drafting import SEQUENCES_MAX
from gpu_worker.engine.scheduler import Committed, Scheduler
from gpu_worker.engine.step_batch import StepBatch
from gpu_worker.engine.step_plan import NO_DRAFT, StepPlan
from gpu_worker.engine.step_runner import ModelRunner
from gpu_worker.engine.step_shares import BURST_STEPS
from gpu_worker.exchange.interface import Exchange
from gpu_worker.exchange.single_rank import SingleRankExchange
from shared.types import Epoch, FinishReason, SamplingParams, SchedulingParams, Step
from shared.wire import SessionTokens, Submit
from tests.unit.gpu_worker.engine.toy import (
    EOS,
    VOCAB,
    ToyModel,
    alone,
    limits,
    logits_after,
    origin,
    submit,
)

PROMPT = (3, 4, 5)


class Guesser(ToyModel):
    """Its guesses are what `guess` makes of the right logits."""

    def __init__(
        self, guess: Callable[[NDArray[np.float32]], NDArray[np.float32]], *, kv_blocks: int = 32
    ) -> None:
        super().__init__(kv_blocks)
        self._guess = guess
        self.num_guesses = 0

    def draft(
        self,
        batch: StepBatch,
        next_ids_T: NDArray[np.int32],
        rows_R: NDArray[np.int32],
        exchange: Exchange,
    ) -> NDArray[np.float32]:
        self.num_guesses += len(rows_R)
        rows = [
            self._guess(logits_after([*self._prefix(batch, t), int(next_ids_T[t])]))
            for t in rows_R.tolist()
        ]
        return np.array(rows, dtype=np.float32).reshape(len(rows), VOCAB)


def right(logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits_V


def wrong(logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
    return -logits_V


def broken(logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.full_like(logits_V, np.nan)


@dataclass
class Run:
    """A scheduler and its runner, step by step."""

    model: ToyModel
    changes: dict[str, int] = field(default_factory=dict)
    drafts: bool = True

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(limits(**self.changes), (EOS,))
        self.runner = ModelRunner(
            self.model, SingleRankExchange(), self.model if self.drafts else None
        )
        self.replies: list[SessionTokens] = []
        self.plans: list[StepPlan] = []
        self.num_drafted = self.num_accepted = self.num_generated = 0

    def submit(self, *submits: Submit) -> None:
        for each in submits:
            assert self.scheduler.submit(origin(), each) is None

    def begin(self) -> StepPlan:
        plan = self.scheduler.plan()
        self.runner.begin(Epoch(1), Step(0), plan, has_work=True)
        return plan

    def step(self) -> Committed:
        plan = self.begin()
        result = self.runner.end()
        committed = self.scheduler.commit(plan, result.ids, result.scores, result.drafts)
        self.plans.append(plan)
        self.num_drafted += committed.num_drafted
        self.num_accepted += committed.num_accepted
        self.num_generated += committed.num_generated
        self.replies += [reply for replies in committed.replies.values() for reply in replies]
        return committed

    def finish(self) -> int:
        """The number of steps."""
        num_steps = 0
        while self.scheduler.has_work:
            self.step()
            num_steps += 1
            assert num_steps < 200
        load = self.scheduler.load()
        assert (load.tokens, load.kv_blocks_free) == (0, load.kv_blocks)
        return num_steps

    def answer(self, session: str = "s") -> tuple[list[int], FinishReason | None]:
        """Checks that indices are in order."""
        ids: list[int] = []
        finish = None
        for reply in self.replies:
            if reply.session == session:
                assert reply.error is None
                assert finish is None
                assert reply.index == len(ids)
                ids += reply.ids
                finish = reply.finish
        return ids, finish


def served(model: ToyModel, *submits: Submit, **changes: int) -> tuple[Run, int]:
    run = Run(model, changes)
    run.submit(*submits)
    return run, run.finish()


def test_right_drafts_take_half_of_the_steps() -> None:
    request = submit(tokens=PROMPT, max_tokens=12)
    run, num_steps = served(Guesser(right), request)
    assert run.answer() == alone(PROMPT, request.sampling)
    # The prompt's step gives one token, each one after it two; the last needs no draft.
    assert num_steps == 1 + 6
    assert (run.num_drafted, run.num_accepted, run.num_generated) == (5, 5, 12)


def test_wrong_drafts_cost_no_step() -> None:
    request = submit(tokens=PROMPT, max_tokens=12)
    run, num_steps = served(Guesser(wrong), request)
    assert run.answer() == alone(PROMPT, request.sampling)
    assert num_steps == 12
    assert (run.num_drafted, run.num_accepted) == (10, 0)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.5, "seed": 6, "top_k": 5, "top_p": 0.8},
        {"temperature": 0.9, "seed": 7, "min_tokens": 6, "ignore_eos": False},
        {"stop_token_ids": tuple(range(1, VOCAB, 3))},
        {"stop_token_ids": tuple(range(0, VOCAB, 2)), "min_tokens": 3},
        {"allowed_token_ids": (1, 7, 9, 11)},
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"max_tokens": 3},
        {"max_tokens": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("kv_block_tokens", [1, 3, 4])
def test_answers_are_those_without_drafts(
    sampling: dict[str, object], kv_block_tokens: int
) -> None:
    requests = [
        submit(f"s{n}", tuple(range(1, 2 + 3 * n)), **{"max_tokens": 20, **sampling})
        for n in range(6)
    ]
    changes = {"context_tokens_max": 40, "kv_block_tokens": kv_block_tokens, "kv_blocks": 60}
    model = ToyModel(60, kv_block_tokens)
    run, _ = served(model, *requests, **changes)
    for request in requests:
        expected = alone(request.tokens, request.sampling, 40)
        assert run.answer(request.session) == expected
    if request.sampling.max_tokens > 3:
        assert 0 < run.num_accepted < run.num_drafted


def test_a_stop_token_that_was_drafted_ends_the_answer() -> None:
    plain = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    ids, _ = alone(PROMPT, plain)
    for end in range(2, 6):
        request = submit(tokens=PROMPT, max_tokens=8, stop_token_ids=(ids[end],))
        run, _ = served(Guesser(right), request)
        expected = ids[: ids.index(ids[end]) + 1]
        assert run.answer() == (expected, FinishReason.STOP)


def test_each_of_several_tokens_of_a_step_has_its_log_probability() -> None:
    request = submit(tokens=PROMPT, max_tokens=9, logprobs=2)
    run, num_steps = served(Guesser(right), request)
    plain = Run(Guesser(right), drafts=False)
    plain.submit(request)
    assert num_steps < plain.finish()
    assert [len(reply.ids) for reply in run.replies] == [1, 2, 2, 2, 2]
    assert [(id_, p) for r in run.replies for id_, p in zip(r.ids, r.logprobs, strict=True)] == [
        (id_, p) for r in plain.replies for id_, p in zip(r.ids, r.logprobs, strict=True)
    ]


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5},
        {"bad_words": ((4,), (2, 3))},
        {"max_tokens": 1},
        {"max_tokens": 2},
    ],
    ids=str,
)
def test_what_cannot_use_a_draft_gets_none(sampling: dict[str, object]) -> None:
    model = Guesser(right)
    run, _ = served(model, submit(tokens=PROMPT, **sampling))
    assert run.num_drafted == model.num_guesses == 0


def test_a_guess_that_is_no_number_is_no_draft() -> None:
    request = submit(tokens=PROMPT, max_tokens=6)
    run, num_steps = served(Guesser(broken), request)
    assert run.answer() == alone(PROMPT, request.sampling)
    assert (num_steps, run.num_drafted) == (6, 0)


def test_a_row_of_a_draft_without_finite_logits_fails_its_session_a_step_later() -> None:
    """In the row that counts, as without drafts; the token before has been sent."""

    class Breaking(Guesser):
        def logits(self, batch: StepBatch) -> NDArray[np.float32]:
            logits_RV = super().logits(batch)
            logits_RV[batch.position_T[batch.logits_rows_R] >= len(PROMPT) + 3] = np.nan
            return logits_RV

    request = submit(tokens=PROMPT, max_tokens=12)
    ids, _ = alone(PROMPT, request.sampling)
    run, _ = served(Breaking(right), request)
    *sent, failed = run.replies
    assert [id_ for reply in sent for id_ in reply.ids] == ids[:4]
    assert (failed.index, failed.ids, failed.error) == (4, (), "the model gave no finite logits")


def test_an_abandoned_step_is_replayed_with_its_draft() -> None:
    request = submit(tokens=PROMPT, max_tokens=12)
    run = Run(ToyModel())
    run.submit(request)
    num_replayed = 0
    while run.scheduler.has_work:
        free = run.scheduler.load().kv_blocks_free
        plan = run.begin()
        run.runner.end()
        run.scheduler.abandon(plan)
        assert run.scheduler.load().kv_blocks_free == free
        again = run.scheduler.plan()
        assert [c.drafts for c in again.chunks] == [c.drafts for c in plan.chunks]
        assert np.array_equal(again.batch.token_ids_T, plan.batch.token_ids_T)
        num_replayed += any(chunk.drafts for chunk in again.chunks)
        run.scheduler.abandon(again)
        run.step()
    assert num_replayed > 3
    assert run.answer() == alone(PROMPT, request.sampling)


def test_a_preempted_sequence_drafts_anew() -> None:
    requests = [submit(f"s{n}", (n + 1, 2, 3), max_tokens=20) for n in range(3)]
    run, _ = served(ToyModel(8), *requests, kv_blocks=8, prefill_chunk_tokens=4)
    for request in requests:
        assert run.answer(request.session) == alone(request.tokens, request.sampling, 32)
    assert 0 < run.num_accepted < run.num_drafted


def test_a_draft_takes_no_block_that_others_need_to_go_on() -> None:
    """Two sequences at the end of their blocks, and two free blocks: none is left for a draft."""
    run = Run(Guesser(right), {"kv_blocks": 4, "kv_block_tokens": 4, "context_tokens_max": 16})
    run.submit(*(submit(name, (1, 2, 3), max_tokens=9) for name in ("a", "b")))
    run.step()
    plan = run.begin()
    assert [len(chunk.drafts) for chunk in plan.chunks] == [0, 0]
    run.scheduler.abandon(plan)
    run.finish()
    assert run.answer("a") == alone((1, 2, 3), submit(max_tokens=9).sampling)


def test_drafts_have_at_most_half_of_what_decodes_leave() -> None:
    run = Run(Guesser(right), {"step_tokens_max": 11, "running_max": 6})
    run.submit(*(submit(f"s{n}", (n + 1,), max_tokens=20) for n in range(5)))
    run.step()
    plan = run.begin()
    assert sorted(chunk.num_tokens for chunk in plan.chunks) == [1, 1, 2, 2, 2]
    assert sum(draft != NO_DRAFT for draft in plan.follows) == (11 - 5) // 2
    assert plan.batch.num_tokens == len(plan.draws) == 8


def test_a_crowded_rank_drafts_nothing() -> None:
    sizes = {"step_tokens_max": 64, "running_max": 40, "waiting_max": 40, "kv_blocks": 200}
    for number, drafts in ((SEQUENCES_MAX, True), (SEQUENCES_MAX + 1, False)):
        run = Run(Guesser(right, kv_blocks=200), sizes)
        run.submit(*(submit(f"s{n}", (n + 1,), max_tokens=6) for n in range(number)))
        run.finish()
        assert (run.num_drafted > 0) is drafts
        for n in range(number):
            assert run.answer(f"s{n}") == alone((n + 1,), submit(max_tokens=6).sampling)


def test_a_draft_counts_as_a_token_of_its_tenants_part() -> None:
    """Three tokens a step, and what it left before: two decode, and one of them has a draft."""
    run = Run(Guesser(right), {"tenant_step_tokens": 3, "running_max": 8})
    for name in ("a1", "a2"):
        run.submit(of_tenant(submit(name, (int(name[1]),), max_tokens=60), "a"))
    run.submit(of_tenant(submit("b", (9,), max_tokens=60), "b"))
    for _ in range(24):
        run.step()
    chunks = [c for plan in run.plans for c in plan.chunks if c.sequence.scheduling.tenant == "a"]
    assert 20 <= sum(len(chunk.drafts) for chunk in chunks) < 40
    assert sum(chunk.num_tokens for chunk in chunks) <= 3 * (24 + BURST_STEPS)


def of_tenant(request: Submit, tenant: str) -> Submit:
    return replace(request, scheduling=SchedulingParams(tenant=tenant))
