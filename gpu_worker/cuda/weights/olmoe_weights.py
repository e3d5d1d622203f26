"""OLMoE's checkpoints for a CUDA rank's decoder: one norm over the queries of all heads and one
over their keys, values that may be clipped, and softmax routing."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.checkpoint.gqa_shape import QK_NORM_WHOLE, read_gqa_shape
from gpu_worker.cuda.weights import qwen3_moe_weights as qwen3_moe
from gpu_worker.cuda.weights.decoder_layout import DecoderLayout
from shared.model_spec import ModelSpec


def olmoe_layout(spec: ModelSpec) -> DecoderLayout:
    """Raises CheckpointError."""
    clip = float(spec.raw.get("clip_qkv") or 0.0)
    return qwen3_moe.layout_of(spec, replace(read_gqa_shape(spec, QK_NORM_WHOLE), clip=clip))
