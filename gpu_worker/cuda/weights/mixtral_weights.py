"""Mixtral's checkpoints for a CUDA rank's decoder: plain grouped-query attention, with a sliding
window in some of them, and softmax routing."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.checkpoint.gqa_shape import QK_NORM_NONE, read_gqa_shape
from gpu_worker.checkpoint.mlp_names import MlpNames
from gpu_worker.cuda.weights.common_weights import decoder_sizes, raise_if_not_silu
from gpu_worker.cuda.weights.decoder_layout import DecoderLayout
from gpu_worker.cuda.weights.decoder_sizes import Routing
from gpu_worker.cuda.weights.gqa_attention import GqaAttention
from gpu_worker.cuda.weights.softmax_moe import SoftmaxMoe
from shared.model_spec import ModelSpec


def mixtral_layout(spec: ModelSpec) -> DecoderLayout:
    """Raises CheckpointError."""
    raise_if_not_silu(spec)
    window = int(spec.raw.get("sliding_window") or 0)
    shape = replace(read_gqa_shape(spec, QK_NORM_NONE), window=window)
    names = MlpNames(gate="w1", up="w3", down="w2")
    moe = SoftmaxMoe(spec, name="block_sparse_moe", expert_names=names)
    return DecoderLayout(
        spec,
        decoder_sizes(spec, attention=shape, routing=Routing(normalise=True)),
        attention=GqaAttention(spec, shape),
        mlps=moe,
    )
