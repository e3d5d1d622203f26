"""Qwen3-MoE's checkpoints for a CUDA rank's decoder: sizes, tensor names, reading."""

from __future__ import annotations

from gpu_worker.checkpoint.checkpoint import Shape
from gpu_worker.checkpoint.common_tensors import common_tensor_shapes
from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, gqa_shapes, read_gqa_shape
from gpu_worker.checkpoint.mlp_names import mlp_shapes
from gpu_worker.cuda.weights.common_weights import (
    decoder_sizes,
    expert_prefix,
    raise_if_unsupported_on_cuda,
    read_decoder,
    read_layer,
    read_mlp,
)
from gpu_worker.cuda.weights.decoder_sizes import Routing
from gpu_worker.cuda.weights.decoder_weights import (
    DecoderWeights,
    GqaWeights,
    LayerWeights,
    MlpWeights,
    MoeWeights,
)
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.model_spec import ModelSpec


class Qwen3MoeCheckpoint:
    """Implements `checkpoint_layouts.CheckpointLayout`."""

    def __init__(self, spec: ModelSpec) -> None:
        raw = spec.raw
        act = raw.get("hidden_act", "silu")
        raise_if_unsupported_on_cuda(
            {
                f"activation {act!r}": act not in ("silu", "swish"),
                "sliding-window attention": bool(raw.get("use_sliding_window", False)),
                "biases in attention": bool(raw.get("attention_bias", False)),
                "a model without expert layers": not spec.moe_layers,
            }
        )
        self._spec = spec
        self._shape = read_gqa_shape(spec, QK_NORM_HEAD)
        self.sizes = decoder_sizes(
            spec,
            attention=self._shape,
            routing=Routing(normalise=bool(raw.get("norm_topk_prob", False))),
        )

    def tensor_shapes(self) -> dict[str, Shape]:
        spec = self._spec
        shapes = common_tensor_shapes(spec)
        for layer in range(spec.num_layers):
            prefix = f"model.layers.{layer}"
            shapes |= gqa_shapes(f"{prefix}.self_attn", spec.hidden_size, self._shape)
            if layer in spec.moe_layers:
                shapes[f"{prefix}.mlp.gate.weight"] = (spec.num_experts, spec.hidden_size)
            else:
                shapes |= mlp_shapes(f"{prefix}.mlp", spec.hidden_size, self.sizes.dense_size)
        for layer in range(spec.num_moe_layers):
            for expert in range(spec.num_experts):
                prefix = self.expert_prefix(layer, expert)
                shapes |= mlp_shapes(prefix, spec.hidden_size, spec.moe_intermediate_size)
        return shapes

    def expert_prefix(self, layer: int, expert: int) -> str:
        return expert_prefix(self._spec, layer, expert)

    def read(self, reader: WeightReader) -> DecoderWeights:
        return read_decoder(reader, self._spec, lambda layer: self._read_layer(reader, layer))

    def _read_layer(self, reader: WeightReader, layer: int) -> LayerWeights:
        prefix = f"model.layers.{layer}.self_attn"
        attention = GqaWeights(
            w_qkv_CH=reader.read_matrix(*(f"{prefix}.{n}_proj.weight" for n in "qkv")),
            q_norm_D=reader.read(f"{prefix}.q_norm.weight"),
            k_norm_D=reader.read(f"{prefix}.k_norm.weight"),
        )
        return read_layer(reader, layer, attention, self._read_mlp(reader, layer))

    def _read_mlp(self, reader: WeightReader, layer: int) -> MoeWeights | MlpWeights:
        prefix = f"model.layers.{layer}.mlp"
        if layer in self._spec.moe_layers:
            return MoeWeights(w_router_EH=reader.read(f"{prefix}.gate.weight"))
        return read_mlp(reader, prefix)
