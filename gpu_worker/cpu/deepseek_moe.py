"""DeepSeek's expert layers, which GLM has too: routed experts in groups, shared experts that every
token goes through, and dense layers first."""

from __future__ import annotations

import numpy as np

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.checkpoint.deepseek_routing import deepseek_shapes, read_deepseek_routing
from gpu_worker.cpu.expert_slots import MlpSlot
from gpu_worker.cpu.family import DenseLayer, MoeLayer
from gpu_worker.cpu.mlp import read_dense, read_mlp
from gpu_worker.cpu.routers import GroupRouter
from gpu_worker.cpu.weights import read_matrix, read_vector
from shared.model_spec import ModelSpec


class DeepseekMoe:
    """With V3's routing if `sigmoid`, else with V2's."""

    def __init__(self, spec: ModelSpec, *, sigmoid: bool) -> None:
        """Raises CheckpointError."""
        self._spec = spec
        self._routing = read_deepseek_routing(spec, sigmoid=sigmoid)

    def tensor_shapes(self, layer: int) -> dict[str, Shape]:
        return deepseek_shapes(self._spec, self._routing, layer)

    def read_mlp(self, checkpoint: Checkpoint, layer: int) -> MoeLayer | DenseLayer:
        spec, prefix = self._spec, f"model.layers.{layer}.mlp"
        name = f"model.layers.{layer}.post_attention_layernorm.weight"
        norm_H = read_vector(checkpoint, name)
        if layer not in spec.moe_layers:
            return DenseLayer(norm_H=norm_H, mlp=read_dense(checkpoint, prefix))
        shared = (
            read_dense(checkpoint, f"{prefix}.shared_experts") if self._routing.num_shared else None
        )
        return MoeLayer(norm_H=norm_H, router=self._router(checkpoint, prefix), shared=shared)

    def read_expert(self, checkpoint: Checkpoint, layer: int, expert: int, slot: MlpSlot) -> None:
        read_mlp(checkpoint, f"model.layers.{layer}.mlp.experts.{expert}", slot)

    def _router(self, checkpoint: Checkpoint, prefix: str) -> GroupRouter:
        routing = self._routing
        correction_E = (
            read_vector(checkpoint, f"{prefix}.gate.e_score_correction_bias")
            if routing.sigmoid
            else np.zeros(self._spec.num_experts, dtype=np.float32)
        )
        return GroupRouter(
            read_matrix(checkpoint, f"{prefix}.gate.weight"),
            correction_E,
            sigmoid=routing.sigmoid,
            num_groups=routing.num_groups,
            topk_group=routing.topk_group,
            normalise=routing.normalise,
            factor=routing.factor,
        )
