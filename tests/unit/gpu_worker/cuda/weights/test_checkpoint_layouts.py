"""A model that CUDA ranks do not serve is refused before a weight is read. The message says what to
do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.cpu.registry import family_class
from gpu_worker.cuda.weights.checkpoint_layouts import CHECKPOINT_LAYOUTS, checkpoint_layout_of
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS
from shared.errors import CheckpointError
from shared.model_spec import ARCHITECTURES, read_model_spec

SIZES = {
    "vocab_size": 304,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    folder = tmp_path_factory.mktemp("checkpoints") / "qwen3_moe"
    create_seeded_checkpoint(folder, seed=7, mlp_only_layers=(1,), **SIZES)
    return folder


def changed(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """A folder with no weights and another config.json."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"use_sliding_window": True}, "sliding-window attention"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"mlp_only_layers": [0, 1, 2]}, "without expert layers"),
        ({"moe_intermediate_size": 24}, "experts of 24"),
        ({"intermediate_size": 40}, "dense layers of 40"),
        ({"head_dim": 48}, "heads of 48, no power of two"),
        ({"num_experts_per_tok": 5}, "top-5 of 4 experts"),
    ],
    ids=str,
)
def test_what_cuda_ranks_do_not_serve_is_refused_with_what_to_do(
    folder: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    spec = read_model_spec(changed(folder, tmp_path, **changes))
    with pytest.raises(CheckpointError) as caught:
        checkpoint_layout_of(spec)
    text = str(caught.value)
    assert complaint in text
    assert "--device cpu" in text
    assert "\n" not in text


def test_cuda_ranks_serve_every_architecture_that_cpu_ranks_do() -> None:
    assert set(CHECKPOINT_LAYOUTS) == set(ARCHITECTURES)


def test_the_refusal_of_an_architecture_names_those_that_are_served(folder: Path) -> None:
    spec = replace(read_model_spec(folder), architecture="OtherForCausalLM")
    with pytest.raises(CheckpointError, match=r"OtherForCausalLM, but .*Qwen3MoeForCausalLM"):
        checkpoint_layout_of(spec)


@pytest.mark.parametrize("family", SEEDED_CONFIGS)
def test_the_tensors_of_a_family_are_those_that_its_cpu_twin_reads(
    family: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SEEDED_CONFIGS[family]))
    spec = read_model_spec(tmp_path)
    layout = CHECKPOINT_LAYOUTS[spec.architecture](spec)
    assert layout.tensor_shapes() == family_class(spec.architecture)(spec).tensor_shapes()


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit=6.0"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "layers of 'chunked_attention'"),
        ("qwen3", {"use_sliding_window": True}, "sliding-window attention"),
        ("glm4_moe", {"head_dim": 10}, "5 rotated elements"),
        ("glm4_moe", {"scoring_func": "softmax"}, "routing scores by 'softmax'"),
        ("mixtral", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("olmoe", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_is_refused(
    family: str, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SEEDED_CONFIGS[family] | changes))
    with pytest.raises(CheckpointError, match=complaint):
        checkpoint_layout_of(read_model_spec(tmp_path))
