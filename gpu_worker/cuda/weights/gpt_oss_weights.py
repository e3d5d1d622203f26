"""gpt-oss's checkpoints for a CUDA rank's decoder: attention sinks, a sliding window in some
layers, and experts with biases and a clamped activation, which are stored together, in MXFP4 as
published."""

from __future__ import annotations

import torch

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.checkpoint.gpt_oss_config import gpt_oss_moe_shapes, read_gpt_oss_windows
from gpu_worker.checkpoint.gqa_shape import QK_NORM_NONE, read_gqa_shape
from gpu_worker.cuda.experts.fused_expert_reader import FusedExpertReader, are_in_mxfp4
from gpu_worker.cuda.weights.common_weights import decoder_sizes, raise_if_not_silu
from gpu_worker.cuda.weights.decoder_layout import DecoderLayout
from gpu_worker.cuda.weights.decoder_sizes import Routing
from gpu_worker.cuda.weights.decoder_weights import MoeWeights
from gpu_worker.cuda.weights.gqa_attention import GqaAttention
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.model_spec import ModelSpec


def gpt_oss_layout(spec: ModelSpec) -> DecoderLayout:
    """Raises CheckpointError."""
    raise_if_not_silu(spec)
    windows = read_gpt_oss_windows(spec)
    shape, moe = read_gqa_shape(spec, QK_NORM_NONE), GptOssMoe(spec)
    has_bias = bool(spec.raw.get("attention_bias", True))
    return DecoderLayout(
        spec,
        # A softmax over the chosen scores alone is one over all, normed.
        decoder_sizes(
            spec,
            attention=shape,
            routing=Routing(normalise=True),
            windows=tuple(windows),
            clamped_experts=True,
        ),
        attention=GqaAttention(spec, shape, qkv_bias=has_bias, o_bias=has_bias, has_sinks=True),
        mlps=moe,
    )


class GptOssMoe:
    """Implements `decoder_layout.MlpPart`."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def tensor_shapes(self, layer: int) -> dict[str, Shape]:
        return gpt_oss_moe_shapes(self._spec, _prefix(layer))

    def read(self, reader: WeightReader, layer: int) -> MoeWeights:
        return MoeWeights(
            w_router_EH=reader.read(f"{_prefix(layer)}.router.weight"),
            b_router_E=reader.read_exact(f"{_prefix(layer)}.router.bias"),
        )

    @property
    def expert_prefixes(self) -> frozenset[str]:
        return frozenset(f"{_prefix(layer)}.experts" for layer in self._spec.moe_layers)

    def open_experts(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> FusedExpertReader:
        moe_layers = self._spec.moe_layers

        def prefix_of(moe_layer: int) -> str:
            return f"{_prefix(moe_layers[moe_layer])}.experts"

        in_mxfp4 = are_in_mxfp4(checkpoint, self.expert_prefixes)
        return FusedExpertReader(checkpoint, prefix_of, dtype, in_mxfp4=in_mxfp4)


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}.mlp"
