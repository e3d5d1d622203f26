"""Configs are completed as transformers' own classes complete them: every key with a default, the
rotary embedding in every spelling; what is not understood is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpu_worker.checkpoint.mla_shape import read_mla_shape
from gpu_worker.checkpoint.rope import read_rope
from gpu_worker.cpu.registry import family_class
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS
from shared.config_defaults import CONFIG_DEFAULTS, complete_config
from shared.errors import CheckpointError
from shared.model_spec import ARCHITECTURES, read_model_spec

HARMLESS = {
    *("attention_dropout", "initializer_range", "router_jitter_noise", "use_cache"),
    *("output_router_logits", "router_aux_loss_coef"),
    *("bos_token_id", "pad_token_id", "eos_token_id"),
    *("pretraining_tp", "num_mtp_layers"),
}
"""Read in training, or not at all. Token ids are read elsewhere."""

DERIVED = {
    "DeepseekV2ForCausalLM": {"head_dim", "num_experts_per_tok"},
    "DeepseekV32ForCausalLM": {"head_dim"},
    "Qwen3ForCausalLM": {"sliding_window", "max_window_layers"},
    "Qwen3MoeForCausalLM": {"sliding_window"},
}
"""Replaced by another key, read only with one that is refused, or demanded of each model."""


NULL_OF_NO_USE = {"v_head_dim", "num_experts_per_tok", "first_k_dense_replace"}
"""Which transformers' class takes as null, and its model then cannot be built."""


def config_class(architecture: str) -> Any:
    return getattr(transformers, architecture.replace("ForCausalLM", "Config"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_default_of_transformers_is_known(architecture: str) -> None:
    theirs = config_class(architecture)
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    fields = {field.name: field.default for field in dataclasses.fields(theirs)}
    wanted = {key: value for key, value in fields.items() if key not in base | HARMLESS}
    wanted |= {"rope_theta": theirs.default_theta}
    wanted["rope_parameters"] = theirs().rope_parameters if architecture.startswith("Gpt") else None
    ours = dict(CONFIG_DEFAULTS[architecture])
    partial = ours.pop("partial_rotary_factor", 1.0)
    assert partial == theirs().rope_parameters.get("partial_rotary_factor", 1.0)
    for key in DERIVED.get(architecture, ()):
        del wanted[key]
    given = ours.pop("rope_parameters", None)
    completed = wanted.pop("rope_parameters")
    assert given == (completed and {k: v for k, v in completed.items() if k != "rope_theta"})
    assert ours == wanted


YARN = {"rope_type": "yarn", "factor": 4.0}
SPELLINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta outside": {"rope_theta": 5e5},
    "theta inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "theta in both": {"rope_theta": 7e5, "rope_scaling": {"rope_theta": 5e5, "type": "default"}},
    "scaling of null": {"rope_scaling": None, "rope_theta": 5e5},
    "empty parameters": {"rope_parameters": {}},
    "parameters of null": {"rope_parameters": None},
    "empty scaling": {"rope_scaling": {}},
    "empty scaling beside parameters": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 3e4}},
    "theta of null beside another": {"rope_theta": None, "rope_parameters": {"rope_theta": 3e4}},
    "yarn": {"rope_scaling": YARN},
    "yarn by its older name": {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 5e5},
    "yarn with both names": {"rope_scaling": YARN | {"type": "linear"}},
    "yarn with its context": {"rope_scaling": YARN | {"original_max_position_embeddings": 64}},
    "yarn with its context outside": {
        "rope_scaling": YARN | {"original_max_position_embeddings": 128},
        "original_max_position_embeddings": 64,
    },
    "yarn without a factor": {
        "rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": 64}
    },
    "parameters": {"rope_parameters": YARN | {"rope_theta": 3e4}},
    "parameters and scaling": {"rope_parameters": {"rope_theta": 3e4}, "rope_scaling": YARN},
    "all keys": {
        "rope_scaling": YARN
        | {
            "original_max_position_embeddings": 64,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.8,
            "mscale_all_dim": 0.7,
            "truncate": False,
        }
    },
    "factor of attention": {"rope_scaling": YARN | {"attention_factor": 1.2}},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_angles_are_those_of_transformers(architecture: str, spelling: str) -> None:
    raw = {"max_position_embeddings": 256, "hidden_size": 64, "num_attention_heads": 4}
    raw |= {"qk_rope_head_dim": 16, "head_dim": 16, **json.loads(json.dumps(SPELLINGS[spelling]))}
    config = config_class(architecture)(**json.loads(json.dumps(raw)))
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        size = int(16 * config.rope_parameters.get("partial_rotary_factor", 1.0))
        theta, factor = config.rope_parameters["rope_theta"], 1.0
        inverse = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    rope = read_rope(
        complete_config(architecture, raw), kinds=("default", "yarn"), may_be_partial=True
    )
    assert rope.kind == kind
    cos_CD, sin_CD = rope.rotations(int(16 * rope.rotated_share), 200)
    angles = torch.arange(200).float()[:, None] * inverse[None].float()
    assert np.abs(cos_CD - (angles.cos() * factor).numpy()).max() < 2e-5
    assert np.abs(sin_CD - (angles.sin() * factor).numpy()).max() < 2e-5


def open_family(folder: Path) -> None:
    spec = read_model_spec(folder)
    family_class(spec.architecture)(spec)


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("qwen3_moe", {"rope_scaling": {"type": "yarn"}}, "'factor'"),
        ("qwen3_moe", {"rope_scaling": YARN | {"long_factor": [1]}}, "long_factor"),
        ("qwen3_moe", {"rope_scaling": YARN | {"mrope_section": [1]}}, "mrope_section"),
        ("qwen3_moe", {"rope_scaling": "yarn"}, "must be an object"),
        ("qwen3_moe", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("qwen3", {"rope_scaling": {"full_attention": YARN}}, "full_attention"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("deepseek_v3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "sliding_attention",
        ),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "each layer"),
        ("deepseek_v32", {"layer_types": ["full_attention"] * 3}, "full_attention"),
        ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads"),
        ("deepseek_v3", {"topk_group": 0}, "topk_group"),
        ("glm4_moe", {"n_group": 0}, "n_group"),
        ("deepseek_v32", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types"),
        ("olmoe", {"clip_qkv": 0.0}, "clip_qkv=0.0"),
        ("mixtral", {"sliding_window": -1}, "sliding_window=-1"),
        ("gpt_oss", {"swiglu_limit": 3.0}, "swiglu_limit=3.0"),
        ("qwen3", {"rms_norm_eps": None}, "rms_norm_eps=null"),
        ("qwen3", {"rope_parameters": None, "rope_theta": None}, "malformed"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen3_moe", {"norm_topk_prob": "false"}, "norm_topk_prob='false'"),
        ("qwen3_moe", {"tie_word_embeddings": 0}, "tie_word_embeddings=0"),
        ("qwen3_moe", {"num_experts_per_tok": True}, "num_experts_per_tok=True"),
        ("qwen3_moe", {"is_causal": False}, "is_causal=False"),
        ("deepseek_v2", {"is_causal": None}, "is_causal=None"),
        ("olmoe", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("mixtral", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ("glm4_moe", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ],
)
def test_what_changes_the_arithmetic_and_is_not_understood_is_refused(
    tmp_path: Path, family: str, change: dict[str, Any], said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SEEDED_CONFIGS[family] | change))
    with pytest.raises(CheckpointError, match=said):
        open_family(tmp_path)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_only_families_with_the_key_leave_rotated_pairs_apart(tmp_path: Path, family: str) -> None:
    """transformers' V2 and V3.2 do not read it."""
    (tmp_path / "config.json").write_text(
        json.dumps(SEEDED_CONFIGS[family] | {"rope_interleave": False})
    )
    spec = read_model_spec(tmp_path)
    shape = read_mla_shape(spec, has_indexer=family == "deepseek_v32")
    assert shape.interleaved is (family != "deepseek_v3")


def test_what_transformers_lets_be_null_may_be_null() -> None:
    for architecture, defaults in CONFIG_DEFAULTS.items():
        fields = dataclasses.fields(config_class(architecture))
        for name in (field.name for field in fields if "None" in str(field.type)):
            if name in defaults and name not in NULL_OF_NO_USE:
                complete_config(architecture, {name: None})


def test_names_for_one_value_replace_each_others_defaults() -> None:
    completed = complete_config("Qwen3MoeForCausalLM", {"num_local_experts": 4})
    assert "num_experts" not in completed
    completed = complete_config("GptOssForCausalLM", {"rope_scaling": YARN})
    assert "rope_parameters" not in completed


def test_keys_that_mean_nothing_are_accepted() -> None:
    raw = {"logits_scaling": 1.0, "scale_emb": 1, "final_logit_softcapping": None, "ep_size": 8}
    assert complete_config("OlmoeForCausalLM", raw).items() >= raw.items()
