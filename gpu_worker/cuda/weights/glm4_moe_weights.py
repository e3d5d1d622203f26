"""GLM-4.5's and 4.6's checkpoints for a CUDA rank's decoder: grouped-query attention with partly
rotated heads, and DeepSeek's expert layers."""

from __future__ import annotations

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, QK_NORM_NONE, read_gqa_shape
from gpu_worker.cuda.weights.common_weights import (
    decoder_sizes,
    raise_if_not_silu,
    raise_if_unsupported_on_cuda,
)
from gpu_worker.cuda.weights.decoder_layout import DecoderLayout
from gpu_worker.cuda.weights.deepseek_moe import DeepseekMoe
from gpu_worker.cuda.weights.gqa_attention import GqaAttention
from shared.model_spec import ModelSpec


def glm4_moe_layout(spec: ModelSpec) -> DecoderLayout:
    """Raises CheckpointError."""
    raw = spec.raw
    raise_if_not_silu(spec)
    raise_if_unsupported_on_cuda({"a model without expert layers": not spec.moe_layers})
    normed = bool(raw.get("use_qk_norm", False))
    shape = read_gqa_shape(spec, QK_NORM_HEAD if normed else QK_NORM_NONE)
    moe = DeepseekMoe(spec, sigmoid=True)
    sizes = decoder_sizes(
        spec,
        attention=shape,
        routing=moe.routing,
        shared_size=moe.shared_size,
        rotates_partly=True,
    )
    rotated = int(shape.head_dim * sizes.rope.rotated_share)
    raise_if_unsupported_on_cuda({f"{rotated} rotated elements": rotated < 2 or rotated % 2 > 0})
    return DecoderLayout(
        spec,
        sizes,
        attention=GqaAttention(spec, shape, qkv_bias=bool(raw.get("attention_bias", False))),
        mlps=moe,
    )
