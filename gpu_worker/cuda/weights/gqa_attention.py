"""The tensors of grouped-query attention in a checkpoint, read for a CUDA rank's decoder."""

from __future__ import annotations

from torch import Tensor

from gpu_worker.checkpoint.checkpoint import Shape
from gpu_worker.checkpoint.gqa_shape import QK_NORM_NONE, GqaShape, gqa_shapes
from gpu_worker.cuda.weights.decoder_weights import GqaWeights
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.model_spec import ModelSpec


class GqaAttention:
    """Implements `decoder_layout.LayerPart`."""

    def __init__(
        self,
        spec: ModelSpec,
        shape: GqaShape,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        has_sinks: bool = False,
    ) -> None:
        self._hidden_size = spec.hidden_size
        self._shape = shape
        self._qkv_bias = qkv_bias
        self._o_bias = o_bias
        self._has_sinks = has_sinks

    def tensor_shapes(self, layer: int) -> dict[str, Shape]:
        prefix, shape = _prefix(layer), self._shape
        shapes = gqa_shapes(
            prefix, self._hidden_size, shape, qkv_bias=self._qkv_bias, o_bias=self._o_bias
        )
        return shapes | ({f"{prefix}.sinks": (shape.num_heads,)} if self._has_sinks else {})

    def read(self, reader: WeightReader, layer: int) -> GqaWeights:
        prefix = _prefix(layer)

        def norm(name: str) -> Tensor | None:
            if self._shape.qk_norm == QK_NORM_NONE:
                return None
            return reader.read(f"{prefix}.{name}_norm.weight")

        biases = [f"{prefix}.{n}_proj.bias" for n in "qkv"]
        return GqaWeights(
            w_qkv_CH=reader.read_matrix(*(f"{prefix}.{n}_proj.weight" for n in "qkv")),
            q_norm=norm("q"),
            k_norm=norm("k"),
            b_qkv_C=reader.read_exact(*biases) if self._qkv_bias else None,
            b_o_H=reader.read_exact(f"{prefix}.o_proj.bias") if self._o_bias else None,
            sinks_Q=reader.read_exact(f"{prefix}.sinks") if self._has_sinks else None,
        )


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"
