"""DeepSeek's checkpoints (V2, V3, V3.2) for a CUDA rank's decoder: sizes, tensor names, reading."""

from __future__ import annotations

from gpu_worker.checkpoint.checkpoint import Shape
from gpu_worker.checkpoint.mla_shape import MlaShape, indexer_shapes, mla_shapes, read_mla_shape
from gpu_worker.cuda.weights.common_weights import decoder_sizes, raise_if_unsupported_on_cuda
from gpu_worker.cuda.weights.decoder_layout import DecoderLayout
from gpu_worker.cuda.weights.decoder_weights import IndexerWeights, MlaWeights
from gpu_worker.cuda.weights.deepseek_moe import DeepseekMoe
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.model_spec import ModelSpec


def deepseek_layout(spec: ModelSpec, *, sigmoid: bool, has_indexer: bool) -> DecoderLayout:
    """Raises CheckpointError."""
    raw = spec.raw
    act = raw.get("hidden_act", "silu")
    raise_if_unsupported_on_cuda(
        {
            f"activation {act!r} (hidden_act)": act not in ("silu", "swish"),
            "biases in attention (attention_bias)": bool(raw.get("attention_bias", False)),
            "biases in MLPs (mlp_bias)": bool(raw.get("mlp_bias", False)),
            "a model without expert layers": not spec.moe_layers,
        }
    )
    shape = read_mla_shape(spec, has_indexer=has_indexer)
    moe = DeepseekMoe(spec, sigmoid=sigmoid)
    return DecoderLayout(
        spec,
        decoder_sizes(spec, attention=shape, routing=moe.routing, shared_size=moe.shared_size),
        attention=MlaAttention(shape),
        mlps=moe,
    )


class MlaAttention:
    """Implements `decoder_layout.LayerPart`."""

    def __init__(self, shape: MlaShape) -> None:
        self._shape = shape

    def tensor_shapes(self, layer: int) -> dict[str, Shape]:
        prefix = _prefix(layer)
        shapes = mla_shapes(prefix, self._shape)
        if self._shape.num_index_heads:
            shapes |= indexer_shapes(f"{prefix}.indexer", self._shape)
        return shapes

    def read(self, reader: WeightReader, layer: int) -> MlaWeights:
        shape, prefix = self._shape, _prefix(layer)
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


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def _read_indexer(reader: WeightReader, prefix: str) -> IndexerWeights:
    return IndexerWeights(
        w_in_CH=reader.read(f"{prefix}.wk.weight", f"{prefix}.weights_proj.weight"),
        w_q_NM=reader.read_matrix(f"{prefix}.wq_b.weight"),
        k_norm_Z=reader.read_exact(f"{prefix}.k_norm.weight"),
        k_bias_Z=reader.read_exact(f"{prefix}.k_norm.bias"),
    )
