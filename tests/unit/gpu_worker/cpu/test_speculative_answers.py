"""Whole answers of CPU ranks with drafts and without: the same tokens, bit for bit, whatever the
layer guesses; with good guesses in fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.scheduler_limits import SchedulerLimits
from gpu_worker.engine.sequence import Origin
from gpu_worker.engine.step_runner import ModelRunner
from gpu_worker.model_tools.seeded_drafts import Guesses
from shared.types import Attempt, SamplingParams, SessionId, Step
from shared.wire import Submit
from tests.support.draft_checkpoints import (
    FAMILIES,
    let_guesses_be_wrong,
    save_with_drafts,
)
from tests.unit.gpu_worker.cpu.reference import VOCAB, random_tokens
from tests.unit.gpu_worker.cpu.runs import EPOCH, RankRun, open_ranks

SAMPLINGS = (
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=1.1, seed=4, top_k=20, top_p=0.9, max_tokens=17),
    SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=tuple(range(0, VOCAB, 9))),
    SamplingParams(temperature=0.6, seed=5, max_tokens=20, min_tokens=9, min_p=0.02),
    SamplingParams(temperature=0.9, seed=6, max_tokens=12, logprobs=1, ignore_eos=True),
)


@dataclass
class Answers:
    """By session: ids, why it ended, and log-probabilities."""

    ids: dict[str, list[int]]
    ends: dict[str, object]
    logprobs: dict[str, list[object]]
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


def requests(rank: int) -> list[Submit]:
    """Prompts of different lengths; the second half of them begins as the first, which is then in
    the cache or in flight."""
    return [
        Submit(
            session=SessionId(f"{rank}/{turn}/{n}"),
            attempt=Attempt(0),
            tokens=tuple(random_tokens(6 + 5 * n, seed=rank).tolist()),
            num_emitted=0,
            sampling=sampling,
        )
        for turn in range(2)
        for n, sampling in enumerate(SAMPLINGS)
    ]


class Engine:
    """A rank's scheduler and runner."""

    def __init__(self, run: RankRun, *, prefix_cache: bool) -> None:
        limits = SchedulerLimits(
            vocab_size=VOCAB,
            context_tokens_max=64,
            kv_blocks=96,
            kv_block_tokens=4,
            step_tokens_max=24,
            prefill_chunk_tokens=7,
            running_max=5,
            waiting_max=32,
            prefix_cache=prefix_cache,
        )
        self.scheduler = Scheduler(limits, eos_token_ids=(1, 2))
        drafts = run.model if run.model.spec.draft_layers else None
        self.runner = ModelRunner(run.model, run.exchange, drafts)
        self.answers = Answers({}, {}, {})

    def submit(self, submits: Sequence[Submit]) -> None:
        for submit in submits:
            assert self.scheduler.submit(Origin(1), submit) is None
            self.answers.ids[submit.session] = []
            self.answers.logprobs[submit.session] = []

    def step(self, number: int) -> bool:
        """Whether any rank had work."""
        has_work = self.scheduler.has_work
        plan = self.scheduler.plan()
        self.runner.begin(EPOCH, Step(number), plan, has_work=has_work)
        result = self.runner.end()
        committed = self.scheduler.commit(plan, result.ids, result.scores, result.drafts)
        answers = self.answers
        answers.num_steps += bool(plan.chunks)
        answers.num_drafted += committed.num_drafted
        answers.num_accepted += committed.num_accepted
        for reply in (reply for batch in committed.replies.values() for reply in batch):
            assert reply.error is None
            assert reply.index == len(answers.ids[reply.session])
            answers.ids[reply.session] += reply.ids
            answers.logprobs[reply.session] += reply.logprobs
            if reply.finish is not None:
                answers.ends[reply.session] = reply.finish
        return result.any_work


def serve(
    folder: Path, num_ranks: int, speculative_tokens: int, *, prefix_cache: bool = True
) -> list[Answers]:
    """Every rank but the last has requests of its own."""
    runs = open_ranks(folder, num_ranks, speculative_tokens=speculative_tokens)
    engines = [Engine(run, prefix_cache=prefix_cache) for run in runs]
    for rank, engine in enumerate(engines[: max(1, num_ranks - 1)]):
        engine.submit(requests(rank))
    number = 0
    with ThreadPoolExecutor(num_ranks) as pool:
        while True:
            steps = [pool.submit(engine.step, number) for engine in engines]
            any_work = {step.result(timeout=60) for step in steps}
            assert len(any_work) == 1, "ranks must agree on whether anybody has work"
            if not any_work.pop():
                return [engine.answers for engine in engines]
            number += 1


def assert_same(with_drafts: Sequence[Answers], without: Sequence[Answers]) -> None:
    for ours, expected in zip(with_drafts, without, strict=True):
        assert ours.ids == expected.ids
        assert ours.ends == expected.ends
        assert ours.logprobs == expected.logprobs
        assert expected.num_drafted == 0
        assert len(ours.ends) == len(ours.ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_guesses_change_nothing(tmp_path: Path, family: str) -> None:
    folder = save_with_drafts(tmp_path / "model", family)
    ours = serve(folder, 1, 1)
    assert_same(ours, serve(folder, 1, 0))
    assert ours[0].num_drafted > 50


@pytest.mark.parametrize("family", FAMILIES)
def test_good_guesses_save_steps_and_change_nothing(tmp_path: Path, family: str) -> None:
    folder = save_with_drafts(tmp_path / "model", family, guesses=Guesses.GOOD)
    ours, without = serve(folder, 1, 1), serve(folder, 1, 0)
    assert_same(ours, without)
    assert 0.7 * ours[0].num_drafted < ours[0].num_accepted < ours[0].num_drafted
    assert ours[0].num_steps < 0.75 * without[0].num_steps


def test_several_ranks_and_one_without_requests(tmp_path: Path) -> None:
    folder = save_with_drafts(tmp_path / "model", guesses=Guesses.GOOD)
    ours = serve(folder, 3, 1)
    assert_same(ours, serve(folder, 3, 0))
    assert ours[0].num_accepted
    assert ours[2].num_steps == 0
    assert ours[0].ids == serve(folder, 1, 1)[0].ids


def test_without_a_prefix_cache(tmp_path: Path) -> None:
    folder = save_with_drafts(tmp_path / "model", guesses=Guesses.GOOD)
    ours = serve(folder, 1, 1, prefix_cache=False)
    assert_same(ours, serve(folder, 1, 0))
    assert ours[0].num_accepted


def test_guesses_that_are_always_wrong(tmp_path: Path) -> None:
    folder = save_with_drafts(tmp_path / "model", guesses=Guesses.GOOD)
    let_guesses_be_wrong(folder)
    ours, without = serve(folder, 1, 1), serve(folder, 1, 0)
    assert_same(ours, without)
    assert ours[0].num_drafted > 50
    assert ours[0].num_accepted <= 2  # sampled ones may hit by chance
    assert ours[0].num_steps >= without[0].num_steps
