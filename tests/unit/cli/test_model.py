"""How `starfish up` describes its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.up.model import check_model
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS
from shared.errors import CheckpointError


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("qwen3", "m (3 layers, dense, hidden 36)"),
        ("mixtral", "m (3 layers, 6 experts, top-2, hidden 36)"),
    ],
)
async def test_a_dense_model_has_no_experts_to_count(
    tmp_path: Path, family: str, sentence: str
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SEEDED_CONFIGS[family]))
    assert await check_model(folder) == sentence
    with pytest.raises(CheckpointError, match="leave out --speculative-tokens"):
        await check_model(folder, 1)
