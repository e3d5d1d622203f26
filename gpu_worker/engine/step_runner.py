"""What computes the steps that the engine schedules: a model over an exchange on CPUs, captured
graphs on CUDA. When a step runs is the engine's; what it holds is the scheduler's."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from gpu_worker.engine.logprobs import StepScores, score_step
from gpu_worker.engine.sampler import sample
from gpu_worker.engine.step_batch import Model
from gpu_worker.engine.step_plan import StepPlan
from gpu_worker.exchange.interface import Exchange
from shared.expert_map import ExpertMap
from shared.types import Epoch, Step


class StepResult(NamedTuple):
    """`ids[i]` is the token of the plan's sampled sequence i, or `sampler.NO_TOKEN`. `any_work` is
    false where all members sleep after this step; the same answer on every rank."""

    ids: list[int]
    scores: StepScores
    any_work: bool


class StepRunner(Protocol):
    """Engine thread only."""

    @property
    def counts_across_epochs(self) -> bool:
        """Whether step numbers go on from one map to the next: ranks meet by counting then, and a
        Wake holds whatever the epoch."""
        ...

    def can_run_ahead_of(self, plan: StepPlan) -> bool:
        """Whether the step after this one can be begun before this one has ended."""
        ...

    def prepare_to_adopt(self, expert_map: ExpertMap) -> bool:
        """Nothing in flight. Does what has to be done under the old map first, and says whether
        `adopt` need not wait for what peers say of this one: adopt it then, or ask again."""
        ...

    def adopt(self, expert_map: ExpertMap) -> Step:
        """Use this map from now on; returns the number of its first step. The rank must be one of
        its members, with every member's link open. Raises StepAbandoned where a newer map has
        arrived meanwhile."""
        ...

    def claim_step(self) -> bool:
        """Whether a step may begin now. True obliges to call `begin` next."""
        ...

    def claim_ahead(self) -> bool:
        """Whether one more may begin now, while one is in flight. True obliges likewise."""
        ...

    def begin(self, epoch: Epoch, step: Step, plan: StepPlan, *, has_work: bool) -> None: ...

    def end(self) -> StepResult:
        """Of the first step in flight. Raises StepAbandoned: the plans of all that are in flight
        are to be thrown away, and a newer map awaited."""
        ...


class ModelRunner:
    """Runs a model layer by layer over an exchange that stamps messages with epoch and step."""

    counts_across_epochs = False

    def __init__(self, model: Model, exchange: Exchange) -> None:
        self._model = model
        self._exchange = exchange
        self._plan: StepPlan | None = None

    def can_run_ahead_of(self, plan: StepPlan) -> bool:
        return False

    def prepare_to_adopt(self, expert_map: ExpertMap) -> bool:
        return True

    def adopt(self, expert_map: ExpertMap) -> Step:
        self._exchange.adopt(expert_map)
        return Step(0)

    def claim_step(self) -> bool:
        return True

    def claim_ahead(self) -> bool:
        return False

    def begin(self, epoch: Epoch, step: Step, plan: StepPlan, *, has_work: bool) -> None:
        self._plan = plan
        self._exchange.begin_step(epoch, step, num_tokens=plan.batch.num_tokens, has_work=has_work)

    def end(self) -> StepResult:
        plan, self._plan = self._plan, None
        assert plan is not None, "no step is in flight"
        forward = self._model.forward(plan.batch, self._exchange)
        ids = sample(forward.logits_RV, plan.draws)
        scores = score_step(plan, forward.logits_RV, ids)
        return StepResult(ids, scores, forward.any_work)
