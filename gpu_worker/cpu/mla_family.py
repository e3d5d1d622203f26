"""What DeepSeek's families have in common: names, sizes and reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.checkpoint.common_tensors import (
    FINAL_NORM_NAME,
    common_tensor_shapes,
    head_name,
    raise_if_unsupported,
)
from gpu_worker.checkpoint.mla_shape import indexer_shapes, mla_shapes, read_mla_shape
from gpu_worker.checkpoint.rope import read_rope
from gpu_worker.checkpoint.tied_head import EMBEDDING_NAME
from gpu_worker.cpu.attention_mla import (
    IndexerWeights,
    MlaAttention,
    MlaScratch,
    MlaWeights,
)
from gpu_worker.cpu.deepseek_moe import DeepseekMoe
from gpu_worker.cpu.expert_slots import MlpSlot
from gpu_worker.cpu.family import Attention, DenseLayer, Floats, KvShape, MoeLayer
from gpu_worker.cpu.kernels import experts, mla, router
from gpu_worker.cpu.kernels.warm_up import EntryPoint
from gpu_worker.cpu.weights import read_matrix, read_vector
from shared.model_spec import ModelSpec


class MlaFamily:
    """Implements `family.Family`. Subclasses set the kind of routing, and whether they have an
    indexer."""

    entry_points: ClassVar[Sequence[EntryPoint]] = (
        *mla.ENTRY_POINTS,
        *router.GROUP_ENTRY_POINTS,
    )
    expert_activation: ClassVar[int] = experts.SWIGLU
    embedding_name = EMBEDDING_NAME
    final_norm_name = FINAL_NORM_NAME
    sigmoid_routing: ClassVar[bool] = True
    has_indexer: ClassVar[bool] = False

    def __init__(self, spec: ModelSpec) -> None:
        raw = spec.raw
        act = raw.get("hidden_act", "silu")
        raise_if_unsupported(
            spec,
            {
                f"activation {act!r} (hidden_act)": act not in ("silu", "swish"),
                "biases in MLPs (mlp_bias)": bool(raw.get("mlp_bias", False)),
            },
        )
        self.spec = spec
        self.rope = read_rope(raw, kinds=("default", "yarn"))
        self.norm_eps = float(raw.get("rms_norm_eps", 1e-6))
        self.head_name = head_name(spec)
        self._bias = bool(raw.get("attention_bias", False))
        self.shape = read_mla_shape(spec, has_indexer=self.has_indexer)
        self._moe = DeepseekMoe(spec, sigmoid=self.sigmoid_routing)

    def tensor_shapes(self) -> dict[str, Shape]:
        spec = self.spec
        shapes = common_tensor_shapes(spec)
        for layer in spec.layers:
            prefix = f"model.layers.{layer}.self_attn"
            shapes |= mla_shapes(prefix, self.shape, bias=self._bias)
            if self.has_indexer:
                shapes |= indexer_shapes(f"{prefix}.indexer", self.shape)
            shapes |= self._moe.tensor_shapes(layer)
        return shapes

    def read_attention(
        self, checkpoint: Checkpoint, kv: KvShape, context_tokens_max: int
    ) -> list[Attention]:
        rotations = self.rope.rotations(self.shape.qk_rope_head_dim, context_tokens_max)
        scratch = MlaScratch(self.shape, kv.block_tokens)
        return [
            MlaAttention(
                weights=self._weights(checkpoint, layer),
                indexer=self._indexer(checkpoint, layer) if self.has_indexer else None,
                shape=self.shape,
                kv=kv,
                rotations=rotations,
                norm_eps=self.norm_eps,
                softmax_factor=self.rope.softmax_factor,
                scratch=scratch,
            )
            for layer in self.spec.layers
        ]

    def read_mlp(self, checkpoint: Checkpoint, layer: int) -> MoeLayer | DenseLayer:
        return self._moe.read_mlp(checkpoint, layer)

    def read_expert(self, checkpoint: Checkpoint, layer: int, expert: int, slot: MlpSlot) -> None:
        self._moe.read_expert(checkpoint, layer, expert, slot)

    def _weights(self, checkpoint: Checkpoint, layer: int) -> MlaWeights:
        prefix, shape = f"model.layers.{layer}.self_attn", self.shape

        def bias(name: str, size: int) -> Floats:
            full_name = f"{prefix}.{name}.bias"
            if not checkpoint.has(full_name):
                return np.zeros(size, dtype=np.float32)
            return read_vector(checkpoint, full_name)

        def matrix(name: str) -> Floats:
            return read_matrix(checkpoint, f"{prefix}.{name}.weight")

        kv_b = checkpoint.read(f"{prefix}.kv_b_proj.weight").reshape(
            shape.num_heads, shape.qk_nope_head_dim + shape.v_head_dim, shape.rank
        )
        nothing = np.zeros((self.spec.hidden_size, 0), dtype=np.float32)
        return MlaWeights(
            norm_H=read_vector(checkpoint, f"model.layers.{layer}.input_layernorm.weight"),
            w_qa_HQ=matrix("q_a_proj") if shape.q_lora_rank else nothing,
            b_qa_Q=bias("q_a_proj", shape.q_lora_rank),
            qa_norm_Q=read_vector(checkpoint, f"{prefix}.q_a_layernorm.weight")
            if shape.q_lora_rank
            else nothing[0],
            w_qb_QP=matrix("q_b_proj" if shape.q_lora_rank else "q_proj"),
            w_kva_HP=matrix("kv_a_proj_with_mqa"),
            b_kva_P=bias("kv_a_proj_with_mqa", shape.rank + shape.qk_rope_head_dim),
            kva_norm_R=read_vector(checkpoint, f"{prefix}.kv_a_layernorm.weight"),
            w_uk_AFR=np.array(kv_b[:, : shape.qk_nope_head_dim], order="C"),
            w_uv_ARG=np.array(kv_b[:, shape.qk_nope_head_dim :].transpose(0, 2, 1), order="C"),
            w_o_OH=matrix("o_proj"),
            b_o_H=bias("o_proj", self.spec.hidden_size),
        )

    def _indexer(self, checkpoint: Checkpoint, layer: int) -> IndexerWeights:
        prefix = f"model.layers.{layer}.self_attn.indexer"
        return IndexerWeights(
            w_q_QP=read_matrix(checkpoint, f"{prefix}.wq_b.weight"),
            w_k_HL=read_matrix(checkpoint, f"{prefix}.wk.weight"),
            k_norm_L=read_vector(checkpoint, f"{prefix}.k_norm.weight"),
            k_bias_L=read_vector(checkpoint, f"{prefix}.k_norm.bias"),
            w_weights_HI=read_matrix(checkpoint, f"{prefix}.weights_proj.weight"),
        )
