"""Runs the engine's steps as captured graphs: one launch, one wait, one copy back. While one graph
is in flight the next may be launched behind it, so that the card does not wait for the host between
them. The graph barrier agrees with the peers on which graphs are launched when."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.cuda.sampling_inputs import RowDraw, needs_logits, row_draws
from gpu_worker.engine.logprobs import StepScores, score_step
from gpu_worker.engine.sampler import sample
from gpu_worker.engine.step_batch import StepBatch
from gpu_worker.engine.step_plan import StepPlan
from gpu_worker.engine.step_runner import StepResult
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierDriver
from gpu_worker.exchange.interface import StepMonitor
from gpu_worker.exchange.replica_policy import ReplicaPolicy, choose_replicas
from shared.clock import Clock
from shared.config import LONGEST_ANNOUNCED_S
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member, RankId, Step, SuspicionReason


class StepMask(Protocol):
    """Which members the kernels wait for. See `ep.rank_mask.RankMask`."""

    def map_members(self, expert_map: ExpertMap) -> Future[None]: ...

    def adopt(self, expert_map: ExpertMap) -> None: ...

    def isolate(self) -> None: ...

    def lost_members(self, mask_R: NDArray[np.int32]) -> list[Member]: ...

    def check_step(self, mask_R: NDArray[np.int32]) -> None: ...


class LaunchedStep(Protocol):
    """See `decoder.PendingStep`."""

    logits_RV: Tensor

    def is_done(self) -> bool: ...

    def ids(self) -> NDArray[np.int32]: ...

    def mask(self) -> NDArray[np.int32] | None: ...


class GraphDecoder(Protocol):
    """See `decoder.Decoder`."""

    def use_slots(self, slot_of_LUE: NDArray[np.int32]) -> None: ...

    def launch(self, batch: StepBatch, draws: Sequence[RowDraw] = ()) -> LaunchedStep: ...


class _StepInFlight(NamedTuple):
    plan: StepPlan
    has_work: bool
    launched: LaunchedStep


class CudaRunner:
    """Implements `engine.step_runner.StepRunner`. `mask` is None in an instance of one rank."""

    counts_across_epochs = True
    adopts_together = False  # how joiners are admitted together is the graph barrier's

    def __init__(
        self,
        *,
        member: Member,
        decoder: GraphDecoder,
        mask: StepMask | None,
        barrier_driver: GraphBarrierDriver,
        monitor: StepMonitor,
        clock: Clock,
        deadline_ms: float,
        replicas: ReplicaPolicy,
        pause: Callable[[], None],
        init_thread: Callable[[], None] = lambda: None,
        has_met_others: bool = False,
    ) -> None:
        """`pause` is called between two looks at a running graph. `init_thread` is called once, on
        the engine thread, before anything else. `has_met_others`: a former incarnation of this
        process has, with the same buffer."""
        self._member = member
        self._decoder = decoder
        self._mask = mask
        self._pause = pause
        self._barrier_driver = barrier_driver
        self._monitor = monitor
        self._clock = clock
        self._deadline_s = deadline_ms / 1e3
        self._replicas = replicas
        self._init_thread: Callable[[], None] | None = init_thread
        self._peers: tuple[RankId, ...] = ()
        self._has_met_others = has_met_others  # the buffer may hold what they have sent
        self._steps_in_flight: deque[_StepInFlight] = deque()
        self._join_suspect_at: float | None = None  # then somebody is suspected

    def can_run_ahead_of(self, plan: StepPlan) -> bool:
        """Not if the host reads the step's logits: the next step overwrites them."""
        return not reads_logits(plan)

    def prepare_to_adopt(self, expert_map: ExpertMap) -> bool:
        if self._init_thread is not None:
            self._init_thread()
            self._init_thread = None
        while self._barrier_driver.claim_launch_before(expert_map):
            self._wait(self._decoder.launch(_EMPTY))
        return self._suspect_if_join_stalls(self._barrier_driver.prepare_adoption(expert_map))

    def adopt(self, expert_map: ExpertMap) -> Step:
        is_joiner = self._member.rank in expert_map.joiners

        def apply_map() -> None:
            if is_joiner and self._mask is not None and self._has_met_others:
                self._mask.isolate()
                self._wait_alone(self._decoder.launch(_EMPTY))
            slots_LUE = physical_slots(expert_map, self._member.rank, self._replicas)
            if self._mask is not None:
                mapping = self._mask.map_members(expert_map)
                self._wait_until_mapped(mapping, num_joiners=len(expert_map.joiners))
                self._mask.adopt(expert_map)
            # After the mask: from then on a verdict of this map's epoch clears no table of slots.
            self._decoder.use_slots(slots_LUE)

        first = self._barrier_driver.adopt(expert_map, apply_map)
        self._peers = tuple(m.rank for m in self._barrier_driver.peers_met(expert_map))
        self._has_met_others = True
        return first

    def flush(self, *, stopped: bool) -> None:
        while self._barrier_driver.claim_flush(stopped=stopped):
            self._wait(self._decoder.launch(_EMPTY))

    @property
    def out_of_step(self) -> Epoch:
        return self._barrier_driver.out_of_step

    def claim_step(self) -> bool:
        return self._suspect_if_join_stalls(self._barrier_driver.claim())

    def claim_ahead(self) -> bool:
        return self._barrier_driver.claim(ahead=True)

    def begin(
        self, epoch: Epoch, step: Step, plan: StepPlan, *, has_work: bool, knows_next: bool = False
    ) -> None:
        launched = self._decoder.launch(plan.batch, row_draws(plan.draws))
        self._steps_in_flight.append(_StepInFlight(plan, has_work, launched))

    def end(self) -> StepResult:
        step_in_flight = self._steps_in_flight.popleft()
        try:
            return self._finish(step_in_flight)
        except StepAbandoned:
            # The graph behind it continues from its tokens. Peers meet that graph before or after
            # they adopt the next map, and wait for nothing else from this rank in between.
            while self._steps_in_flight:
                self._wait(self._steps_in_flight.popleft().launched)
            raise

    def _finish(self, step_in_flight: _StepInFlight) -> StepResult:
        launched = step_in_flight.launched
        self._wait(launched)
        mask_R = launched.mask()
        if self._mask is not None and mask_R is not None:
            self._mask.check_step(mask_R)
        asleep = self._barrier_driver.commit(had_work=step_in_flight.has_work)
        plan, began = step_in_flight.plan, self._clock.now()
        ids, scores = _sampled(plan, launched)
        return StepResult(
            ids,
            scores,
            any_work=not asleep,
            num_drawn=sum(map(needs_logits, plan.draws)),
            drawn_s=self._clock.now() - began,
        )

    def _wait(self, launched: LaunchedStep) -> None:
        """A peer that dies or hangs delays the step. This rank goes on to report that it lives,
        and suspects one peer, so that the control plane probes all of them. No kernel tells which
        peer it is."""
        suspects_at = self._clock.now() + self._deadline_s
        waiting_for: tuple[RankId, ...] = ()
        while not launched.is_done():
            if not waiting_for and self._clock.now() > suspects_at:
                waiting_for = self._peers
                self._suspect_next(self._peers, "a graph waits for some peer")
            self._monitor.beat(waiting_for)
            self._pause()
        lost = self._lost_members(launched)
        for member in lost:
            self._monitor.suspect(
                member.rank, SuspicionReason.EXCHANGE, "a graph has ended without it"
            )
        self._barrier_driver.on_graph_done(lost)

    def _wait_alone(self, launched: LaunchedStep) -> None:
        """For a graph that waits for nobody, and is not counted."""
        while not launched.is_done():
            self._monitor.beat(())
            self._pause()

    def _wait_until_mapped(self, mapping: Future[None], *, num_joiners: int) -> None:
        """A joiner may take a second beside a busy card. This rank goes on to report that it lives,
        for as long as it could announce of each. Raises what the mapping raised."""
        until = self._clock.now() + max(1, num_joiners) * LONGEST_ANNOUNCED_S
        while not mapping.done():
            if self._clock.now() < until:
                self._monitor.beat(())
            self._pause()
        mapping.result()

    def _lost_members(self, launched: LaunchedStep) -> list[Member]:
        """Whom a graph lacks without a reason known by now, whether or not anybody wants its
        result: counts would differ unnoticed."""
        mask_R = launched.mask()
        if self._mask is None or mask_R is None:
            return []
        return self._mask.lost_members(mask_R)

    def _suspect_if_join_stalls(self, may: bool) -> bool:
        """In the pause of a join no kernel waits for a member that hangs, so it is suspected
        here."""
        awaited = [] if may else [m.rank for m in self._barrier_driver.awaited()]
        now = self._clock.now()
        if not awaited:
            self._join_suspect_at = None
        elif self._join_suspect_at is None:
            self._join_suspect_at = now + self._deadline_s
        elif now > self._join_suspect_at:
            self._join_suspect_at = math.inf  # once
            self._suspect_next(awaited, "it keeps a join waiting")
        return may

    def _suspect_next(self, ranks: Sequence[RankId], detail: str) -> None:
        """Suspects one of these. Different ranks suspect different ones, if there are several."""
        later = [rank for rank in ranks if rank > self._member.rank]
        for rank in (later or ranks)[:1]:
            self._monitor.suspect(rank, SuspicionReason.EXCHANGE, detail)


def physical_slots(
    expert_map: ExpertMap, own_rank: RankId, policy: ReplicaPolicy
) -> NDArray[np.int32]:
    """`[L, U, E]`: the slot, counted over all ranks, to which this rank sends an expert's tokens in
    each turn."""
    choice = choose_replicas(expert_map, own_rank, policy)
    return choice.rank_LUE * np.int32(expert_map.slots_per_rank) + choice.slot_LUE


def reads_logits(plan: StepPlan) -> bool:
    """Whether the host must see logits of this step."""
    return bool(plan.scored) or any(needs_logits(draw) for draw in plan.draws)


def _sampled(plan: StepPlan, launched: LaunchedStep) -> tuple[list[int], StepScores]:
    ids = launched.ids()[: len(plan.draws)].tolist()
    if not reads_logits(plan):
        return ids, StepScores(((),) * len(ids), ())
    logits_RV: NDArray[np.float32] = launched.logits_RV.float().cpu().numpy()
    for row, draw in enumerate(plan.draws):
        if needs_logits(draw):
            (ids[row],) = sample(logits_RV[row : row + 1], [draw])
    return ids, score_step(plan, logits_RV, ids)


_EMPTY = StepBatch(
    token_ids_T=np.zeros(0, dtype=np.int32),
    position_T=np.zeros(0, dtype=np.int32),
    sequence_T=np.zeros(0, dtype=np.int32),
    block_tables_SB=np.zeros((0, 1), dtype=np.int32),
    logits_rows_R=np.zeros(0, dtype=np.int32),
)
