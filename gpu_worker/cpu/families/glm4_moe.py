"""GLM-4.5 and 4.6 MoE: grouped-query attention with partly rotated heads, DeepSeek's experts."""

from __future__ import annotations

from typing import ClassVar

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.checkpoint.common_tensors import raise_if_unsupported
from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, QK_NORM_NONE, read_gqa_shape
from gpu_worker.cpu.deepseek_moe import DeepseekMoe
from gpu_worker.cpu.expert_slots import MlpSlot
from gpu_worker.cpu.family import DenseLayer, MoeLayer
from gpu_worker.cpu.gqa_family import GqaFamily
from gpu_worker.cpu.kernels import gqa, router
from shared.model_spec import ModelSpec


class Glm4Moe(GqaFamily):
    entry_points: ClassVar = (*gqa.ENTRY_POINTS, *router.GROUP_ENTRY_POINTS)

    rotates_partly = True

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        raw = spec.raw
        normed = bool(raw.get("use_qk_norm", False))
        self.shape = read_gqa_shape(spec, QK_NORM_HEAD if normed else QK_NORM_NONE)
        self.o_bias = False
        self.rotary_dim = int(self.shape.head_dim * self.rope.rotated_share)
        raise_if_unsupported(
            spec,
            {f"{self.rotary_dim} rotated elements": self.rotary_dim < 2 or self.rotary_dim % 2 > 0},
        )
        self._moe = DeepseekMoe(spec, sigmoid=True)

    def moe_shapes(self, layer: int) -> dict[str, Shape]:
        return self._moe.tensor_shapes(layer)

    def read_mlp(self, checkpoint: Checkpoint, layer: int) -> MoeLayer | DenseLayer:
        return self._moe.read_mlp(checkpoint, layer)

    def read_expert(self, checkpoint: Checkpoint, layer: int, expert: int, slot: MlpSlot) -> None:
        self._moe.read_expert(checkpoint, layer, expert, slot)


FAMILY = Glm4Moe
