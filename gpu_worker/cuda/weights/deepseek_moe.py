"""DeepSeek's expert layers, which GLM has too, read for a CUDA rank's decoder: routed experts in
groups, shared experts that every token goes through, and dense layers first."""

from __future__ import annotations

import torch

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.checkpoint.deepseek_routing import deepseek_shapes, read_deepseek_routing
from gpu_worker.cuda.experts.expert_reader import ExpertReader, are_scaled
from gpu_worker.cuda.weights.common_weights import read_mlp
from gpu_worker.cuda.weights.decoder_sizes import Routing
from gpu_worker.cuda.weights.decoder_weights import MlpWeights, MoeWeights
from gpu_worker.cuda.weights.scaled_blocks import multiplies_fp8
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.model_spec import ModelSpec


class DeepseekMoe:
    """Implements `decoder_layout.MlpPart`. With V3's routing if `sigmoid`, else with V2's."""

    def __init__(self, spec: ModelSpec, *, sigmoid: bool) -> None:
        """Raises CheckpointError."""
        self._spec = spec
        self._routing = routing = read_deepseek_routing(spec, sigmoid=sigmoid)
        self.shared_size = routing.num_shared * spec.moe_intermediate_size
        self.routing = Routing(
            sigmoid=sigmoid,
            num_groups=routing.num_groups,
            topk_group=routing.topk_group,
            normalise=routing.normalise,
            factor=routing.factor,
        )

    def tensor_shapes(self, layer: int) -> dict[str, Shape]:
        return deepseek_shapes(self._spec, self._routing, layer)

    def read(self, reader: WeightReader, layer: int) -> MoeWeights | MlpWeights:
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

    @property
    def expert_prefixes(self) -> frozenset[str]:
        experts = range(self._spec.num_experts)
        return frozenset(
            f"model.layers.{layer}.mlp.experts.{e}"
            for layer in self._spec.moe_layers
            for e in experts
        )

    def open_experts(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> ExpertReader:
        moe_layers = self._spec.moe_layers

        def prefix_of(moe_layer: int, expert: int) -> str:
            return f"model.layers.{moe_layers[moe_layer]}.mlp.experts.{expert}"

        scaled = multiplies_fp8(device) and are_scaled(checkpoint, self.expert_prefixes)
        return ExpertReader(checkpoint, prefix_of, dtype, scaled=scaled)
