"""The sizes of the models that `benchmarks.gpu` and `benchmarks.gpu_server` measure. Imports no
kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, QK_NORM_NONE, GqaShape
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.checkpoint.rope import Rope
from gpu_worker.cuda.weights.checkpoint_layouts import CHECKPOINT_LAYOUTS
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes, Routing
from shared.model_spec import read_model_spec


def qwen3_30b(layers: int | None) -> DecoderSizes:
    """Qwen3-30B-A3B, complete."""
    layers = layers or 48
    return DecoderSizes(
        num_layers=layers,
        hidden_size=2048,
        vocab_size=151_936,
        attention=GqaShape(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm=QK_NORM_HEAD),
        rope=Rope(theta=1e6, kind="default", scaling={}, context_tokens_max=4096),
        moe_layers=tuple(range(layers)),
        num_experts=128,
        top_k=8,
        inner_size=768,
    )


def deepseek_small(layers: int | None) -> DecoderSizes:
    """DeepSeek-V3's layers with experts of a quarter of their inner size, and only a few layers:
    one dense, the others with experts."""
    layers = layers or 8
    return DecoderSizes(
        num_layers=layers,
        hidden_size=7168,
        vocab_size=129_280,
        attention=MlaShape(
            hidden_size=7168,
            num_heads=128,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rank=512,
            q_lora_rank=1536,
            interleaved=True,
        ),
        rope=Rope(
            theta=10_000.0,
            kind="yarn",
            scaling={
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            context_tokens_max=163_840,
        ),
        moe_layers=tuple(range(1, layers)),
        num_experts=256,
        top_k=8,
        inner_size=512,
        routing=Routing(sigmoid=True, num_groups=8, topk_group=4, factor=2.5),
        shared_size=2048,
        dense_size=18_432,
    )


def gpt_oss_20b(layers: int | None) -> DecoderSizes:
    """gpt-oss-20b, complete."""
    layers = layers or 24
    return DecoderSizes(
        num_layers=layers,
        hidden_size=2880,
        vocab_size=201_088,
        attention=GqaShape(num_heads=64, num_kv_heads=8, head_dim=64, qk_norm=QK_NORM_NONE),
        rope=Rope(
            theta=150_000.0,
            kind="yarn",
            scaling={
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "truncate": False,
            },
            context_tokens_max=131_072,
        ),
        moe_layers=tuple(range(layers)),
        num_experts=32,
        top_k=4,
        inner_size=2880,
        norm_eps=1e-5,
        windows=tuple(0 if layer % 2 else 128 for layer in range(layers)),
        clamped_experts=True,
    )


SHAPES: dict[str, Callable[[int | None], DecoderSizes]] = {
    "qwen3-30b": qwen3_30b,
    "deepseek-small": deepseek_small,
    "gpt-oss-20b": gpt_oss_20b,
}

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "qwen3-30b": {
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "vocab_size": 151_936,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen3-235b": {
        "num_hidden_layers": 12,
        "hidden_size": 4096,
        "vocab_size": 151_936,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
        "intermediate_size": 12_288,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "reference": {},
}
"""Entries of the config.json of a random Qwen3-MoE checkpoint: Qwen3-30B-A3B, an eighth of the
layers of Qwen3-235B-A22B, and the reference size as it is."""


def sizes_of(folder: Path) -> DecoderSizes | None:
    """None if CUDA ranks do not support the checkpoint's architecture. Raises CheckpointError."""
    spec = read_model_spec(folder)
    layout = CHECKPOINT_LAYOUTS.get(spec.architecture)
    return None if layout is None else layout(spec).sizes
