"""Dense Qwen3's checkpoints for a CUDA rank's decoder: a norm on every head, and no experts."""

from __future__ import annotations

from gpu_worker.checkpoint.common_tensors import read_layer_types
from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, read_gqa_shape
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


def qwen3_layout(spec: ModelSpec) -> DecoderLayout:
    """Raises CheckpointError."""
    raw = spec.raw
    raise_if_not_silu(spec)
    windowed = bool(raw.get("use_sliding_window", False))
    raise_if_unsupported_on_cuda({"sliding-window attention (use_sliding_window)": windowed})
    read_layer_types(spec, ("full_attention",))
    shape, mlps = read_gqa_shape(spec, QK_NORM_HEAD), SoftmaxMoe(spec)
    has_bias = bool(raw.get("attention_bias", False))
    return DecoderLayout(
        spec,
        decoder_sizes(spec, attention=shape, routing=Routing()),
        attention=GqaAttention(spec, shape, qkv_bias=has_bias, o_bias=has_bias),
        mlps=mlps,
    )
