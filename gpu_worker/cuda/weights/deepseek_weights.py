"""DeepSeek's checkpoints (V2, V3, V3.2) for a CUDA rank's decoder: sizes, tensor names, reading."""

from __future__ import annotations

from gpu_worker.checkpoint.checkpoint import Shape
from gpu_worker.checkpoint.common_tensors import common_tensor_shapes
from gpu_worker.checkpoint.deepseek_routing import deepseek_shapes, read_deepseek_routing
from gpu_worker.checkpoint.mla_shape import indexer_shapes, mla_shapes, read_mla_shape
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
    IndexerWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
)
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.model_spec import ModelSpec


class DeepseekCheckpoint:
    """Implements `checkpoint_layouts.CheckpointLayout`."""

    def __init__(self, spec: ModelSpec, *, sigmoid: bool, has_indexer: bool) -> None:
        raw = spec.raw
        act = raw.get("hidden_act", "silu")
        raise_if_unsupported_on_cuda(
            {
                f"activation {act!r}": act != "silu",
                "biases in attention": bool(raw.get("attention_bias", False)),
                "biases in MLPs": bool(raw.get("mlp_bias", False)),
                "a model without expert layers": not spec.moe_layers,
            }
        )
        self._spec = spec
        self._shape = read_mla_shape(spec, has_indexer=has_indexer)
        self._routing = routing = read_deepseek_routing(spec, sigmoid=sigmoid)
        self.sizes = decoder_sizes(
            spec,
            attention=self._shape,
            routing=Routing(
                sigmoid=sigmoid,
                num_groups=routing.num_groups,
                topk_group=routing.topk_group,
                normalise=routing.normalise,
                factor=routing.factor,
            ),
            shared_size=routing.num_shared * spec.moe_intermediate_size,
        )

    def tensor_shapes(self) -> dict[str, Shape]:
        shapes = common_tensor_shapes(self._spec)
        for layer in range(self._spec.num_layers):
            prefix = f"model.layers.{layer}.self_attn"
            shapes |= mla_shapes(prefix, self._shape)
            if self._shape.num_index_heads:
                shapes |= indexer_shapes(f"{prefix}.indexer", self._shape)
            shapes |= deepseek_shapes(self._spec, self._routing, layer)
        return shapes

    def expert_prefix(self, layer: int, expert: int) -> str:
        return expert_prefix(self._spec, layer, expert)

    def read(self, reader: WeightReader) -> DecoderWeights:
        return read_decoder(reader, self._spec, lambda layer: self._read_layer(reader, layer))

    def _read_layer(self, reader: WeightReader, layer: int) -> LayerWeights:
        attention = self._read_attention(reader, f"model.layers.{layer}.self_attn")
        return read_layer(reader, layer, attention, self._read_mlp(reader, layer))

    def _read_attention(self, reader: WeightReader, prefix: str) -> MlaWeights:
        shape = self._shape
        has_latent = shape.q_lora_rank > 0
        up_AER = reader.read(f"{prefix}.kv_b_proj.weight").view(
            shape.num_heads, shape.qk_nope_head_dim + shape.v_head_dim, shape.rank
        )
        return MlaWeights(
            w_in_CH=reader.read_matrix(
                f"{prefix}.{'q_a_proj' if has_latent else 'q_proj'}.weight",
                f"{prefix}.kv_a_proj_with_mqa.weight",
            ),
            q_norm_M=reader.read(f"{prefix}.q_a_layernorm.weight") if has_latent else None,
            w_q_NM=reader.read_matrix(f"{prefix}.q_b_proj.weight") if has_latent else None,
            kv_norm_R=reader.read(f"{prefix}.kv_a_layernorm.weight"),
            w_uk_ARF=up_AER[:, : shape.qk_nope_head_dim].transpose(1, 2).contiguous(),
            w_uv_AGR=up_AER[:, shape.qk_nope_head_dim :].contiguous(),
            indexer=_read_indexer(reader, f"{prefix}.indexer") if shape.num_index_heads else None,
        )

    def _read_mlp(self, reader: WeightReader, layer: int) -> MoeWeights | MlpWeights:
        prefix = f"model.layers.{layer}.mlp"
        if layer not in self._spec.moe_layers:
            return read_mlp(reader, prefix)
        correction = f"{prefix}.gate.e_score_correction_bias"
        return MoeWeights(
            w_router_EH=reader.read(f"{prefix}.gate.weight"),
            correction_E=reader.read_exact(correction) if self._routing.sigmoid else None,
            shared=(
                read_mlp(reader, f"{prefix}.shared_experts") if self._routing.num_shared else None
            ),
        )


def _read_indexer(reader: WeightReader, prefix: str) -> IndexerWeights:
    return IndexerWeights(
        w_in_CH=reader.read(f"{prefix}.wk.weight", f"{prefix}.weights_proj.weight"),
        w_q_NM=reader.read_matrix(f"{prefix}.wq_b.weight"),
        k_norm_Z=reader.read_exact(f"{prefix}.k_norm.weight"),
        k_bias_Z=reader.read_exact(f"{prefix}.k_norm.bias"),
    )
