"""Computes the steps: a model over an exchange on CPUs, captured graphs on CUDA. The engine decides
when a step runs, and the scheduler what it contains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from gpu_worker.engine.drafting import draft_step
from gpu_worker.engine.logprobs import StepScores, score_step
from gpu_worker.engine.monitor import EngineMonitor
from gpu_worker.engine.sampler import sample
from gpu_worker.engine.step_batch import DraftModel, Model
from gpu_worker.engine.step_plan import NO_DRAFTS, StepPlan
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks, GraphBarrierDriver
from gpu_worker.exchange.interface import Exchange
from shared.clock import Clock
from shared.expert_map import ExpertMap
from shared.types import Epoch, Step


class StepResult(NamedTuple):
    """`ids[i]` is the token of the plan's sampled sequence i, or `sampler.NO_TOKEN`. `any_work` is
    false if all members sleep after this step. `drafts[i]` is a guess of what follows `ids[i]`.
    `all_may_adopt`: all know of the next map, and adopt it now; `all_pad`: they know, and do so
    after one more step, without tokens. The host drew `num_drawn` tokens, all in `drawn_s`; 0 if
    nobody counts that. But for these, tokens and guesses it is the same on every rank."""

    ids: list[int]
    scores: StepScores
    any_work: bool
    drafts: Mapping[int, int] = NO_DRAFTS
    all_may_adopt: bool = False
    all_pad: bool = False
    num_drawn: int = 0
    drawn_s: float = 0.0


class StepRunner(Protocol):
    """Engine thread only."""

    @property
    def counts_across_epochs(self) -> bool:
        """Whether step numbers go on from one map to the next. Ranks meet by counting then, and a
        Wake is valid in any epoch."""
        ...

    @property
    def adopts_together(self) -> bool:
        """Whether steps tell who knows of the next map, so that nobody need adopt a planned one
        before all do."""
        ...

    def can_run_ahead_of(self, plan: StepPlan) -> bool:
        """Whether the step after this one can be begun before this one has ended."""
        ...

    def prepare_to_adopt(self, expert_map: ExpertMap) -> bool:
        """Does what must be done under the old map first. Nothing is in flight. True: call `adopt`,
        which need not wait for the peers any more. False: ask again later."""
        ...

    def adopt(self, expert_map: ExpertMap) -> Step:
        """Uses this map from now on; returns the number of its first step. This rank must be one of
        its members, and every member's link open. Raises StepAbandoned if a newer map has arrived
        meanwhile."""
        ...

    def claim_step(self) -> bool:
        """Whether a step may begin now. If true, the caller must call `begin` next."""
        ...

    def claim_ahead(self) -> bool:
        """Whether one more may begin while one is in flight. If true, the caller must call
        `begin` next."""
        ...

    def flush(self, *, stopped: bool) -> None:
        """Meets what peers have in flight and wait for this rank in. Nothing is in flight here.
        `stopped`: no step will begin before a newer map is adopted."""
        ...

    @property
    def out_of_step(self) -> Epoch:
        """The map under which this rank has lost count of its peers, so that it can go on only as a
        joiner of a newer one. 0: it has not. Any thread may ask."""
        ...

    def begin(
        self, epoch: Epoch, step: Step, plan: StepPlan, *, has_work: bool, knows_next: bool = False
    ) -> None:
        """Begins a step. A card computes it from now on, a CPU rank in `end`. `knows_next`: a
        planned map is here, which waits until all know of it."""
        ...

    def end(self) -> StepResult:
        """Ends the first step in flight: waits for a card, and computes it on a CPU rank.
        Raises StepAbandoned: the caller abandons the plans of all steps in flight and waits for a
        newer map."""
        ...


class RunnerParts(NamedTuple):
    """`barrier_driver` is None if messages carry the epoch, so that ranks need not count graphs."""

    runner: StepRunner
    barrier_driver: GraphBarrierDriver | None = None


MakeRunner = Callable[[EngineMonitor, GraphBarrierCallbacks], RunnerParts]
"""Called once, on the event loop."""


class ModelRunner:
    """Runs a model layer by layer over an exchange that stamps messages with epoch and step."""

    counts_across_epochs = False

    def __init__(
        self,
        model: Model,
        exchange: Exchange,
        drafts: DraftModel | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`drafts` is the same model, if it has a layer that drafts; on every rank, or on none.
        `clock` measures the draws; None: nobody does."""
        self._model = model
        self._drafts = drafts
        self._exchange = exchange
        self._clock = clock
        self._plan: StepPlan | None = None

    @property
    def adopts_together(self) -> bool:
        return self._model.num_moe_layers > 0

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

    def flush(self, *, stopped: bool) -> None:
        """Messages carry epoch and step: none is taken for another."""

    @property
    def out_of_step(self) -> Epoch:
        return Epoch(0)

    def begin(
        self, epoch: Epoch, step: Step, plan: StepPlan, *, has_work: bool, knows_next: bool = False
    ) -> None:
        self._plan = plan
        self._exchange.begin_step(
            epoch,
            step,
            num_tokens=plan.batch.num_tokens,
            has_work=has_work,
            knows_next=knows_next,
        )

    def end(self) -> StepResult:
        plan, self._plan = self._plan, None
        assert plan is not None, "no step is in flight"
        forward = self._model.forward(plan.batch, self._exchange)
        began = self._now()
        ids = sample(forward.logits_RV, plan.draws)
        scores = score_step(plan, forward.logits_RV, ids)
        drawn_s = self._now() - began
        drafts: Mapping[int, int] = NO_DRAFTS
        if self._drafts is not None and forward.any_tokens:
            drafts = draft_step(self._drafts, self._exchange, plan, ids)
        all_know, may_change = forward.all_know_next, self._exchange.may_change_map
        return StepResult(
            ids,
            scores,
            forward.any_work,
            drafts,
            all_may_adopt=all_know and may_change,
            all_pad=all_know and not may_change,
            num_drawn=len(plan.draws),
            drawn_s=drawn_s,
        )

    def _now(self) -> float:
        return 0.0 if self._clock is None else self._clock.now()
