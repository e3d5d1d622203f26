"""Angles are those of transformers' own functions, plain and stretched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpu_worker.checkpoint.rope import read_rope
from shared.errors import CheckpointError

YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 0.7,
    "rope_theta": 10_000.0,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": None, "mscale_all_dim": None},
        {"attention_factor": 1.3},
        {"truncate": False},
        {"beta_fast": 4, "factor": 2.0},
    ],
    ids=str,
)
def test_yarn_is_that_of_transformers(change: dict[str, Any]) -> None:
    scaling = {key: value for key, value in (YARN | change).items() if value is not None}
    config = DeepseekV3Config(
        rope_parameters=scaling, qk_rope_head_dim=20, max_position_embeddings=2560
    )
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    rope = read_rope(
        {"rope_parameters": scaling, "max_position_embeddings": 2560}, kinds=("default", "yarn")
    )
    cos_CD, sin_CD = rope.rotations(20, 2000)
    angles = torch.arange(2000).float()[:, None] * inverse[None].float()
    assert np.abs(cos_CD - (angles.cos() * factor).numpy()).max() < 2e-4
    assert np.abs(sin_CD - (angles.sin() * factor).numpy()).max() < 2e-4


def test_the_old_spelling_means_the_same() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "yarn"} | YARN}
    del old["rope_scaling"]["rope_type"], old["rope_scaling"]["rope_theta"]
    new = {"rope_parameters": YARN | {"rope_theta": 5e5}}
    length = {"max_position_embeddings": 2560}
    tables = [read_rope(c | length, kinds=("yarn",)).rotations(16, 50) for c in (old, new)]
    assert np.array_equal(tables[0][0], tables[1][0])


def test_gpt_oss_defaults_are_read() -> None:
    config = GptOssConfig(num_hidden_layers=2)
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    rope = read_rope(config.to_dict(), kinds=("yarn",))
    cos_CD, _ = rope.rotations(config.head_dim, 300)
    angles = torch.arange(300).float()[:, None] * inverse[None].float()
    assert np.abs(cos_CD - (angles.cos() * factor).numpy()).max() < 1e-4


def test_a_kind_that_a_family_does_not_know_is_refused() -> None:
    raw = {"rope_scaling": {"rope_type": "llama3"}, "max_position_embeddings": 8}
    with pytest.raises(CheckpointError, match="llama3"):
        read_rope(raw)
