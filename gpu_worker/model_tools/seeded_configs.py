"""The config.json of a seeded checkpoint, for each family: the reference model of Starfish, and for
the other families small models that use every part of the family. Their sizes are not multiples of
a vector width."""

from __future__ import annotations

from typing import Any

DEFAULT_FAMILY = "qwen3_moe"

Config = dict[str, Any]

_COMMON: Config = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "use_cache": True,
}
_SMALL: Config = _COMMON | {
    "vocab_size": 515,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
}
_YARN: Config = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": False,
}
_GQA: Config = _SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
_MLA: Config = _SMALL | {
    "attention_bias": False,
    "intermediate_size": 22,
    "moe_intermediate_size": 10,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 14,
    "q_lora_rank": 18,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
    "rope_interleave": True,
}

SEEDED_CONFIGS: dict[str, Config] = {
    "deepseek_v2": _MLA
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "qk_nope_head_dim": 8,  # even: the reference views pairs as complex numbers
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": _MLA | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
    "deepseek_v32": _MLA
    | {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        # Enough heads that no two positions have zero scores in all of them.
        "index_n_heads": 17,
        "index_head_dim": 11,
        "index_topk": 8,
    },
    "glm4_moe": _GQA
    | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "head_dim": 12,
        "attention_bias": True,
        "use_qk_norm": True,
        "rope_parameters": _COMMON["rope_parameters"] | {"partial_rotary_factor": 0.5},
        "intermediate_size": 22,
        "moe_intermediate_size": 10,
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-5,
    },
    "gpt_oss": _GQA
    | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 14,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": _YARN,
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
    },
    "mixtral": _GQA
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 14,
        "sliding_window": 9,
        "rms_norm_eps": 1e-5,
    },
    "olmoe": _SMALL
    | {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "attention_bias": False,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 14,
        "norm_topk_prob": False,
        "clip_qkv": 1.5,
        "rms_norm_eps": 1e-5,
    },
    "qwen3": _GQA
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "intermediate_size": 22,
        "use_sliding_window": False,
    },
    "qwen3_moe": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 4096,
        "num_hidden_layers": 8,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 128,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
    },
}
"""By the name of the family's file in `cpu/families/`."""
