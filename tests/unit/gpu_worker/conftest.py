"""Small checkpoints, made once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from tests.unit.gpu_worker.cpu.runs import SMALL


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, the middle one dense. Read-only."""
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    create_seeded_checkpoint(folder, seed=7, mlp_only_layers=(1,), **SMALL)
    return folder
