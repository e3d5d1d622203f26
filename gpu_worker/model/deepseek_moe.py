"""The expert layers of DeepSeek's kind, which GLM has, too: routed experts of groups, shared ones
that every token goes through, dense layers first."""

from __future__ import annotations

import numpy as np

from gpu_worker.model.checkpoint import Checkpoint, Shape
from gpu_worker.model.expert_slots import ExpertWeights
from gpu_worker.model.family import DenseLayer, MoeLayer
from gpu_worker.model.frame import dense_size
from gpu_worker.model.mlp import mlp_shapes, read_dense, read_mlp
from gpu_worker.model.routers import GroupRouter
from gpu_worker.model.weights import read_matrix, read_vector
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec


class DeepseekMoe:
    """`sigmoid`: V3's routing; else V2's."""

    def __init__(self, spec: ModelSpec, *, sigmoid: bool) -> None:
        """Raises CheckpointError."""
        raw = spec.raw
        self._spec = spec
        self._sigmoid = sigmoid
        try:
            self._num_shared = int(raw.get("n_shared_experts") or 0)
            self._num_groups = int(raw.get("n_group") or 1)
            self._kept = int(raw.get("topk_group") or 1)
            self._factor = float(raw.get("routed_scaling_factor") or 1.0)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: malformed {error}") from error
        self._normalise = bool(raw.get("norm_topk_prob", sigmoid)) and sigmoid
        if not sigmoid and raw.get("topk_method", "greedy") == "greedy":
            self._num_groups = self._kept = 1
        if not self._groups_can_be():
            raise CheckpointError(
                f"config.json: {spec.top_k} experts from {self._kept} of {self._num_groups} groups "
                f"of {spec.num_experts} experts cannot be"
            )

    def _groups_can_be(self) -> bool:
        size, rest = divmod(self._spec.num_experts, self._num_groups)
        if rest or not 1 <= self._kept <= self._num_groups:
            return False
        counts_by_two = self._sigmoid and self._kept < self._num_groups
        return size >= (2 if counts_by_two else 1) and self._kept * size >= self._spec.top_k

    def tensor_shapes(self, layer: int) -> dict[str, Shape]:
        spec, prefix = self._spec, f"model.layers.{layer}.mlp"
        if layer not in spec.moe_layers:
            return mlp_shapes(prefix, spec.hidden_size, dense_size(spec))
        shapes: dict[str, Shape] = {f"{prefix}.gate.weight": (spec.num_experts, spec.hidden_size)}
        if self._sigmoid:
            shapes[f"{prefix}.gate.e_score_correction_bias"] = (spec.num_experts,)
        if self._num_shared:
            shared_size = self._num_shared * spec.moe_intermediate_size
            shapes |= mlp_shapes(f"{prefix}.shared_experts", spec.hidden_size, shared_size)
        for expert in range(spec.num_experts):
            expert_prefix = f"{prefix}.experts.{expert}"
            shapes |= mlp_shapes(expert_prefix, spec.hidden_size, spec.moe_intermediate_size)
        return shapes

    def read_mlp(self, checkpoint: Checkpoint, layer: int) -> MoeLayer | DenseLayer:
        spec, prefix = self._spec, f"model.layers.{layer}.mlp"
        name = f"model.layers.{layer}.post_attention_layernorm.weight"
        norm_H = read_vector(checkpoint, name)
        if layer not in spec.moe_layers:
            return DenseLayer(norm_H=norm_H, mlp=read_dense(checkpoint, prefix))
        shared = read_dense(checkpoint, f"{prefix}.shared_experts") if self._num_shared else None
        return MoeLayer(norm_H=norm_H, router=self._router(checkpoint, prefix), shared=shared)

    def read_expert(self, checkpoint: Checkpoint, layer: int, expert: int) -> ExpertWeights:
        return read_mlp(checkpoint, f"model.layers.{layer}.mlp.experts.{expert}")

    def _router(self, checkpoint: Checkpoint, prefix: str) -> GroupRouter:
        correction_E = (
            read_vector(checkpoint, f"{prefix}.gate.e_score_correction_bias")
            if self._sigmoid
            else np.zeros(self._spec.num_experts, dtype=np.float32)
        )
        return GroupRouter(
            read_matrix(checkpoint, f"{prefix}.gate.weight"),
            correction_E,
            sigmoid=self._sigmoid,
            num_groups=self._num_groups,
            kept=self._kept,
            normalise=self._normalise,
            factor=self._factor,
        )
