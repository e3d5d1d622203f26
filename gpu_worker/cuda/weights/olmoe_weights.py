"""OLMoE's checkpoints for a CUDA rank's decoder: one norm over the queries of all heads and one
over their keys, values that may be clipped, and softmax routing."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.checkpoint.gqa_shape import QK_NORM_WHOLE, read_gqa_shape
from gpu_worker.cuda.weights.common_weights import decoder_sizes, raise_if_not_silu
from gpu_worker.cuda.weights.decoder_layout import DecoderLayout
from gpu_worker.cuda.weights.decoder_sizes import Routing
from gpu_worker.cuda.weights.gqa_attention import GqaAttention
from gpu_worker.cuda.weights.softmax_moe import SoftmaxMoe
from shared.model_spec import ModelSpec


def olmoe_layout(spec: ModelSpec) -> DecoderLayout:
    """Raises CheckpointError."""
    raw = spec.raw
    raise_if_not_silu(spec)
    clip = float(raw.get("clip_qkv") or 0.0)
    shape, moe = replace(read_gqa_shape(spec, QK_NORM_WHOLE), clip=clip), SoftmaxMoe(spec)
    has_bias = bool(raw.get("attention_bias", False))
    return DecoderLayout(
        spec,
        decoder_sizes(
            spec,
            attention=shape,
            routing=Routing(normalise=bool(raw.get("norm_topk_prob", False))),
        ),
        attention=GqaAttention(spec, shape, qkv_bias=has_bias, o_bias=has_bias),
        mlps=moe,
    )
