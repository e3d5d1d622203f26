"""The runner of a CPU rank: as any model over an exchange, with experts on demand."""

from __future__ import annotations

from gpu_worker.cpu.decoder import Decoder
from gpu_worker.engine.step_runner import ModelRunner
from gpu_worker.exchange.interface import Exchange
from shared.clock import Clock
from shared.expert_map import ExpertMap
from shared.types import RankId, Step


class CpuRunner(ModelRunner):
    """Implements `engine.step_runner.StepRunner`."""

    def __init__(self, model: Decoder, exchange: Exchange, rank: RankId, clock: Clock) -> None:
        super().__init__(model, exchange, model if model.spec.draft_layers else None, clock)
        self._on_demand = model.on_demand
        self._rank = rank

    def adopt(self, expert_map: ExpertMap) -> Step:
        first = super().adopt(expert_map)
        self._on_demand.use(expert_map.on_demand_of(self._rank))
        return first
