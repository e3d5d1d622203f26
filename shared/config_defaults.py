"""Completes a config.json: what it leaves out has the family's default, as in transformers, and
what changes a model's arithmetic but is not understood is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import CheckpointError

Config = dict[str, Any]

_COMMON: Config = {
    "attention_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_DEEPSEEK: Config = _COMMON | {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_DEEPSEEK_V3: Config = _DEEPSEEK | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
}

CONFIG_DEFAULTS: dict[str, Config] = {
    "DeepseekV2ForCausalLM": _DEEPSEEK
    | {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "first_k_dense_replace": 0,
        "n_group": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_group": None,
        "topk_method": "greedy",
        "norm_topk_prob": False,
    },
    "DeepseekV3ForCausalLM": _DEEPSEEK_V3
    | {"max_position_embeddings": 4096, "rope_interleave": True},
    "DeepseekV32ForCausalLM": _DEEPSEEK_V3
    | {
        "max_position_embeddings": 163840,
        "mlp_bias": False,
        "mlp_layer_types": None,
        "layer_types": None,
        "index_topk": 2048,
        "index_head_dim": 128,
        "index_n_heads": 64,
    },
    "Glm4MoeForCausalLM": _COMMON
    | {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
    },
    "GptOssForCausalLM": _COMMON
    | {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
        "layer_types": None,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    "MixtralForCausalLM": {key: _COMMON[key] for key in _COMMON if key != "attention_bias"}
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": None,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    "OlmoeForCausalLM": _COMMON
    | {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "clip_qkv": None,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
    },
    "Qwen3ForCausalLM": _COMMON
    | {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "layer_types": None,
    },
    "Qwen3MoeForCausalLM": _COMMON
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
    },
}
"""Every key that changes the arithmetic of a family, with its value in transformers' config class
of that family. The ranks read them all."""

NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_SAME_VALUE = (NUM_EXPERTS, ("rope_parameters", "rope_scaling"))
"""Different families' and versions' names for one value."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "attention_multiplier": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "query_pre_attn_scalar": (),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (False, 0),
    "no_rope_layers": ([],),
    "use_parallel_residual": (False,),
    "scale_emb": (1, 1.0),
    "scale_depth": (),
}
"""Keys of other families that no family here reads. Besides null, the values that mean nothing."""

_NULLABLE = {
    *("q_lora_rank", "topk_method", "norm_topk_prob", "rope_interleave", "sliding_window"),
    *("num_key_value_heads", "n_group", "topk_group", "partial_rotary_factor", "rope_parameters"),
    "rope_theta",  # beside that of the scaling
    *("n_routed_experts", "n_shared_experts"),  # DeepSeek's own code: none
}
"""Keys with a default other than null that may be null. For all others null is no value in
transformers either."""

_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}
_POSITIVE = ("sliding_window", "clip_qkv")
_LISTS = ("layer_types", "mlp_layer_types", "mlp_only_layers")


def complete_config(architecture: str, config: Mapping[str, Any]) -> Config:
    """Raises CheckpointError for a key that is not understood."""
    for key, neutral in _NEUTRAL.items():
        value = config.get(key)
        if value is not None and value not in neutral:
            raise CheckpointError(
                f"config.json has {key}={value!r:.60}, which changes the model's arithmetic and "
                f"which Starfish does not serve for {architecture}"
            )
    if config.get("is_causal", True) is not True:
        raise CheckpointError(
            f"config.json has is_causal={config['is_causal']!r:.60}; attention is causal here"
        )
    defaults = CONFIG_DEFAULTS[architecture]
    for key in defaults.keys() & config.keys():
        _check_value(key, config[key], defaults[key])
    given = _without_empty_rope(config)
    present = set(given)
    for names in _SAME_VALUE:
        if any(given.get(name) is not None for name in names):
            present |= set(names)
    return {key: value for key, value in defaults.items() if key not in present} | given


def _check_value(key: str, value: Any, default: Any) -> None:
    """Raises CheckpointError if the value is not of the default's type: a text "false" would count
    as true, and null as whatever the code that reads it takes it for."""
    if value is None:
        if default is not None and key not in _NULLABLE:
            raise CheckpointError(
                f"config.json: malformed {key}=null; leave it out for its default"
            )
        return
    types, wanted = _wanted(key, default)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise CheckpointError(f"config.json has {key}={value!r:.60}, which is not {wanted}")
    if key in _POSITIVE and isinstance(value, int | float) and value <= 0:
        raise CheckpointError(
            f"config.json has {key}={value!r:.60}, which is not above 0; null: none"
        )


def _wanted(key: str, default: Any) -> tuple[tuple[type, ...], str]:
    """The types of a key's value, and what they are called."""
    if key in _LISTS:
        return (list,), "a list"
    if default is None:
        return _TYPES[float]
    return _TYPES.get(type(default), ((object,), "anything"))  # read_rope checks objects


def _without_empty_rope(config: Mapping[str, Any]) -> Config:
    """As transformers: null and an empty `rope_scaling` leave the family's default, which an empty
    `rope_parameters` replaces."""
    is_empty = {"rope_scaling": not config.get("rope_scaling")}
    is_empty["rope_parameters"] = config.get("rope_parameters") is None
    return {key: value for key, value in config.items() if not is_empty.get(key, False)}
