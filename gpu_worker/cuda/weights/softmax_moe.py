"""Layers with experts that a softmax chooses, and dense ones among them or alone, read for a CUDA
rank's decoder."""

from __future__ import annotations

import torch

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.checkpoint.common_tensors import dense_size
from gpu_worker.checkpoint.mlp_names import USUAL_NAMES, MlpNames, mlp_shapes
from gpu_worker.cuda.experts.expert_reader import (
    ExpertReader,
    ExpertSource,
    NoExperts,
    are_scaled,
)
from gpu_worker.cuda.weights.common_weights import read_mlp
from gpu_worker.cuda.weights.decoder_weights import MlpWeights, MoeWeights
from gpu_worker.cuda.weights.scaled_blocks import multiplies_fp8
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.model_spec import ModelSpec


class SoftmaxMoe:
    """Implements `decoder_layout.MlpPart`. A layer's router and experts stand under `name`, with
    `expert_names` for the matrices of each."""

    def __init__(
        self, spec: ModelSpec, *, name: str = "mlp", expert_names: MlpNames = USUAL_NAMES
    ) -> None:
        self._spec = spec
        self._name = name
        self._expert_names = expert_names

    def tensor_shapes(self, layer: int) -> dict[str, Shape]:
        spec = self._spec
        if layer not in spec.moe_layers:
            return mlp_shapes(f"model.layers.{layer}.mlp", spec.hidden_size, dense_size(spec))
        prefix = self._prefix(layer)
        shapes: dict[str, Shape] = {f"{prefix}.gate.weight": (spec.num_experts, spec.hidden_size)}
        for expert in range(spec.num_experts):
            shapes |= mlp_shapes(
                f"{prefix}.experts.{expert}",
                spec.hidden_size,
                spec.moe_intermediate_size,
                self._expert_names,
            )
        return shapes

    def read(self, reader: WeightReader, layer: int) -> MoeWeights | MlpWeights:
        if layer in self._spec.moe_layers:
            return MoeWeights(w_router_EH=reader.read(f"{self._prefix(layer)}.gate.weight"))
        return read_mlp(reader, f"model.layers.{layer}.mlp")

    @property
    def expert_prefixes(self) -> frozenset[str]:
        experts = range(self._spec.num_experts)
        return frozenset(
            f"{self._prefix(layer)}.experts.{e}" for layer in self._spec.moe_layers for e in experts
        )

    def open_experts(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> ExpertSource:
        moe_layers, names = self._spec.moe_layers, self._expert_names
        if not moe_layers:
            return NoExperts(self._spec.hidden_size, dtype)

        def prefix_of(moe_layer: int, expert: int) -> str:
            return f"{self._prefix(moe_layers[moe_layer])}.experts.{expert}"

        scaled = multiplies_fp8(device) and are_scaled(checkpoint, self.expert_prefixes, names)
        return ExpertReader(checkpoint, prefix_of, dtype, matrix_names=names, scaled=scaled)

    def _prefix(self, layer: int) -> str:
        return f"model.layers.{layer}.{self._name}"
