"""Qwen3-MoE's checkpoints for a CUDA rank's decoder: a norm on every head, softmax routing."""

from __future__ import annotations

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, GqaShape, read_gqa_shape
from gpu_worker.cuda.weights.common_weights import (
    decoder_sizes,
    raise_if_not_silu,
    raise_if_unsupported_on_cuda,
)
from gpu_worker.cuda.weights.decoder_layout import DecoderLayout
from gpu_worker.cuda.weights.decoder_sizes import Routing
from gpu_worker.cuda.weights.gqa_attention import GqaAttention
from gpu_worker.cuda.weights.softmax_moe import SoftmaxMoe
from shared.model_spec import ModelSpec


def qwen3_moe_layout(spec: ModelSpec) -> DecoderLayout:
    """Raises CheckpointError."""
    raise_if_unsupported_on_cuda(
        {
            "sliding-window attention (use_sliding_window)": bool(
                spec.raw.get("use_sliding_window", False)
            ),
            "a model without expert layers": not spec.moe_layers,
        }
    )
    return layout_of(spec, read_gqa_shape(spec, QK_NORM_HEAD))


def layout_of(spec: ModelSpec, shape: GqaShape) -> DecoderLayout:
    """What such checkpoints have in common, whatever the norms of their attention. Raises
    CheckpointError."""
    raise_if_not_silu(spec)
    raw = spec.raw
    has_bias = bool(raw.get("attention_bias", False))
    return DecoderLayout(
        spec,
        decoder_sizes(
            spec,
            attention=shape,
            routing=Routing(normalise=bool(raw.get("norm_topk_prob", False))),
        ),
        attention=GqaAttention(spec, shape, qkv_bias=has_bias, o_bias=has_bias),
        mlps=SoftmaxMoe(spec),
    )
