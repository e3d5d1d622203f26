"""What families with grouped-query attention have in common: names, sizes and reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.checkpoint.common_tensors import (
    FINAL_NORM_NAME,
    common_tensor_shapes,
    dense_size,
    head_name,
    raise_if_unsupported,
)
from gpu_worker.checkpoint.gqa_shape import QK_NORM_NONE, GqaShape, gqa_shapes, read_gqa_shape
from gpu_worker.checkpoint.mlp_names import USUAL_NAMES, MlpNames, mlp_shapes
from gpu_worker.checkpoint.rope import read_rope
from gpu_worker.checkpoint.tied_head import EMBEDDING_NAME
from gpu_worker.cpu.attention_gqa import GqaAttention, GqaScratch, read_gqa
from gpu_worker.cpu.expert_slots import MlpSlot
from gpu_worker.cpu.family import Attention, DenseLayer, KvShape, MoeLayer, Router
from gpu_worker.cpu.kernels import experts, gqa, router
from gpu_worker.cpu.kernels.warm_up import EntryPoint
from gpu_worker.cpu.mlp import read_dense, read_mlp
from gpu_worker.cpu.routers import SoftmaxRouter
from gpu_worker.cpu.weights import read_matrix, read_vector
from shared.model_spec import ModelSpec


class GqaFamily:
    """Implements `family.Family` for models of Llama's kind, with softmax routing if there are
    experts. Subclasses override what differs."""

    entry_points: ClassVar[Sequence[EntryPoint]] = (*gqa.ENTRY_POINTS, *router.ENTRY_POINTS)
    expert_activation: ClassVar[int] = experts.SWIGLU
    embedding_name = EMBEDDING_NAME
    final_norm_name = FINAL_NORM_NAME
    qk_norm: ClassVar[int] = QK_NORM_NONE
    has_sinks: ClassVar[bool] = False
    rope_kinds: ClassVar[tuple[str, ...]] = ("default", "yarn")
    rotates_partly: ClassVar[bool] = False
    mlp_name: ClassVar[str] = "mlp"
    router_name: ClassVar[str] = "gate"
    expert_names: ClassVar[MlpNames] = USUAL_NAMES

    def __init__(self, spec: ModelSpec) -> None:
        raw = spec.raw
        act = raw.get("hidden_act")
        raise_if_unsupported(spec, {f"activation {act!r} (hidden_act)": not _is_silu(raw)})
        self.spec = spec
        self.rope = read_rope(raw, kinds=self.rope_kinds, may_be_partial=self.rotates_partly)
        self.norm_eps = float(raw.get("rms_norm_eps", 1e-6))
        self.head_name = head_name(spec)
        self.shape = read_gqa_shape(spec, self.qk_norm)
        self.qkv_bias = self.o_bias = bool(raw.get("attention_bias", False))
        self.rotary_dim = self.shape.head_dim
        """The number of elements of a head that are rotated."""

    def shape_of(self, layer: int) -> GqaShape:
        return self.shape

    def tensor_shapes(self) -> dict[str, Shape]:
        spec = self.spec
        shapes = common_tensor_shapes(spec)
        for layer in spec.layers:
            prefix = f"model.layers.{layer}"
            shapes |= self._attention_shapes(layer)
            if layer in spec.moe_layers:
                shapes |= self.moe_shapes(layer)
            else:
                shapes |= mlp_shapes(f"{prefix}.mlp", spec.hidden_size, dense_size(spec))
        return shapes

    def moe_shapes(self, layer: int) -> dict[str, Shape]:
        spec, prefix = self.spec, self.mlp_prefix(layer)
        shapes: dict[str, Shape] = {
            f"{prefix}.{self.router_name}.weight": (spec.num_experts, spec.hidden_size)
        }
        for expert in range(spec.num_experts):
            shapes |= mlp_shapes(
                f"{prefix}.experts.{expert}",
                spec.hidden_size,
                spec.moe_intermediate_size,
                self.expert_names,
            )
        return shapes

    def read_attention(
        self, checkpoint: Checkpoint, kv: KvShape, context_tokens_max: int
    ) -> list[Attention]:
        rotations = self.rope.rotations(self.rotary_dim, context_tokens_max)
        scratch = GqaScratch(hidden_size=self.spec.hidden_size, shape=self.shape)
        return [
            GqaAttention(
                weights=read_gqa(
                    checkpoint,
                    f"model.layers.{layer}.self_attn",
                    f"model.layers.{layer}.input_layernorm.weight",
                ),
                kv=kv,
                shape=self.shape_of(layer),
                rotations=rotations,
                norm_eps=self.norm_eps,
                scratch=scratch,
            )
            for layer in self.spec.layers
        ]

    def read_mlp(self, checkpoint: Checkpoint, layer: int) -> MoeLayer | DenseLayer:
        name = f"model.layers.{layer}.post_attention_layernorm.weight"
        norm_H = read_vector(checkpoint, name)
        if layer in self.spec.moe_layers:
            return MoeLayer(norm_H=norm_H, router=self.read_router(checkpoint, layer))
        return DenseLayer(norm_H=norm_H, mlp=read_dense(checkpoint, f"model.layers.{layer}.mlp"))

    def read_router(self, checkpoint: Checkpoint, layer: int) -> Router:
        name = f"{self.mlp_prefix(layer)}.{self.router_name}.weight"
        return SoftmaxRouter(read_matrix(checkpoint, name), normalise=self.normalises_weights())

    def normalises_weights(self) -> bool:
        """Whether the weights of a token's experts sum to one."""
        return bool(self.spec.raw.get("norm_topk_prob", False))

    def read_expert(self, checkpoint: Checkpoint, layer: int, expert: int, slot: MlpSlot) -> None:
        prefix = f"{self.mlp_prefix(layer)}.experts.{expert}"
        read_mlp(checkpoint, prefix, slot, self.expert_names)

    def mlp_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.mlp_name}"

    def _attention_shapes(self, layer: int) -> dict[str, Shape]:
        prefix, shape = f"model.layers.{layer}.self_attn", self.shape_of(layer)
        shapes = gqa_shapes(
            prefix,
            self.spec.hidden_size,
            shape,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
        )
        return shapes | ({f"{prefix}.sinks": (shape.num_heads,)} if self.has_sinks else {})


def _is_silu(raw: dict[str, Any]) -> bool:
    return raw.get("hidden_act", "silu") in ("silu", "swish")
