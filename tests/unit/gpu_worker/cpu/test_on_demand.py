"""Experts without a slot are computed on demand, and their outputs are the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpu_worker.checkpoint.checkpoint import INDEX_FILE
from gpu_worker.cpu.runner import CpuRunner
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.clock import SystemClock
from shared.errors import CheckpointError
from shared.types import EMPTY_SLOT, Epoch
from tests.unit.gpu_worker.cpu.runs import (
    SMALL,
    Chunk,
    RankRun,
    make_batch,
    open_ranks,
    step_together,
)

TOKENS = [tuple(range(10, 30)), tuple(range(40, 47))]
TABLE = tuple(range(8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("on-demand") / "model"
    create_seeded_checkpoint(result, seed=3, **SMALL)
    return result


def take_out(runs: list[RankRun], experts: set[int]) -> None:
    """These experts lose all their slots, and are on demand of the ranks in turn."""
    old = runs[0].expert_map
    placement = np.where(np.isin(old.placement, list(experts)), EMPTY_SLOT, old.placement)
    width = -(-len(experts) // len(runs))
    on_demand = np.full((old.num_layers, len(runs), width), EMPTY_SLOT, dtype=np.int16)
    for index, expert in enumerate(sorted(experts)):
        on_demand[:, index % len(runs), index // len(runs)] = expert
    new = replace(
        old, epoch=Epoch(old.epoch + 1), placement=placement.astype(np.int16), on_demand=on_demand
    )
    assert new.uncovered() == []
    for run in runs:
        run.model.slots.load_all(new.placement[:, run.member.rank])
        run.monitor.epoch, run.expert_map, run.steps = new.epoch, new, 0
        CpuRunner(run.model, run.exchange, run.member.rank, SystemClock()).adopt(new)


def logits(runs: list[RankRun]) -> list[np.ndarray]:
    batches = [make_batch([Chunk(tokens=t, start=0, table=TABLE)]) for t in TOKENS]
    return [forward.logits_RV.copy() for forward in step_together(runs, batches)]


def test_experts_on_demand_have_the_outputs_of_those_in_slots(folder: Path) -> None:
    runs = open_ranks(folder, 2)
    num_experts = runs[0].model.spec.num_experts
    with_slots = logits(runs)
    take_out(runs, {0, 3, num_experts - 1})
    on_demand = logits(runs)
    for one, other in zip(with_slots, on_demand, strict=True):
        np.testing.assert_array_equal(one, other)
    take_out(runs, set(range(num_experts)))  # and without a slot at all
    for one, other in zip(with_slots, logits(runs), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_expert_that_cannot_be_read_is_not_left_out(tmp_path: Path, folder: Path) -> None:
    runs = open_ranks(folder, 1)
    take_out(runs, {1})
    on_demand = runs[0].model.on_demand

    def fails(*_: object) -> None:
        raise CheckpointError(f"{tmp_path / INDEX_FILE} is gone")

    on_demand._read_expert = fails
    with pytest.raises(CheckpointError, match="is gone"):
        logits_of_one(runs)


def logits_of_one(runs: list[RankRun]) -> np.ndarray:
    return runs[0].logits(Chunk(tokens=tuple(range(10, 60)), start=0, table=tuple(range(16))))
