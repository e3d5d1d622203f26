"""Qwen3-MoE: grouped-query attention with a norm on every head's queries and keys, softmax routing,
no shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gpu_worker.model.attention_gqa import GqaAttention, GqaScratch, GqaWeights
from gpu_worker.model.checkpoint import Checkpoint, Shape
from gpu_worker.model.expert_slots import ExpertWeights
from gpu_worker.model.family import Attention, DenseLayer, Floats, KvShape, MoeLayer
from gpu_worker.model.kernels import experts, gqa, router
from gpu_worker.model.mlp import mlp_shapes, read_dense, read_mlp
from gpu_worker.model.rope import Rope, read_rope
from gpu_worker.model.routers import SoftmaxRouter
from gpu_worker.model.weights import read_matrices, read_matrix, read_vector
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What config.json says beyond ModelSpec."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dense_inner_size: int
    rope: Rope
    norm_eps: float
    normalise_top_k: bool
    attention_bias: bool
    tied_embeddings: bool

    @property
    def heads_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.heads_size + 2 * self.kv_size


def read_sizes(spec: ModelSpec) -> Sizes:
    """Raises CheckpointError where config.json is malformed or asks for what is not built."""
    raw = spec.raw
    _refuse_unsupported(spec)
    try:
        num_heads = int(raw["num_attention_heads"])
        sizes = Sizes(
            num_heads=num_heads,
            num_kv_heads=int(raw["num_key_value_heads"]),
            head_dim=int(raw.get("head_dim") or spec.hidden_size // num_heads),
            dense_inner_size=int(raw.get("intermediate_size", 0)),
            rope=read_rope(raw),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            normalise_top_k=bool(raw.get("norm_topk_prob", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json: missing or malformed {error}") from error
    if min(num_heads, sizes.num_kv_heads, sizes.head_dim) < 1 or sizes.head_dim % 2:
        raise CheckpointError("config.json: head counts must be positive and head_dim even")
    if num_heads % sizes.num_kv_heads:
        raise CheckpointError(
            "config.json: num_attention_heads must be a multiple of num_key_value_heads"
        )
    return sizes


def _refuse_unsupported(spec: ModelSpec) -> None:
    raw = spec.raw
    reasons = {
        "sliding-window attention": bool(raw.get("use_sliding_window", False)),
        f"activation {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "quantised weights": raw.get("quantization_config") is not None,
        "a model without expert layers": not spec.moe_layers,
        f"top-{spec.top_k} of {spec.num_experts} experts": spec.top_k > spec.num_experts,
    }
    for reason, applies in reasons.items():
        if applies:
            raise CheckpointError(f"config.json asks for {reason}, which Starfish does not serve")


class Qwen3Moe:
    """Implements `family.Family`."""

    entry_points: ClassVar = (*gqa.ENTRY_POINTS, *router.ENTRY_POINTS)
    expert_activation: ClassVar = experts.SWIGLU
    embedding_name = "model.embed_tokens.weight"
    final_norm_name = "model.norm.weight"

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._sizes = read_sizes(spec)
        self.norm_eps = self._sizes.norm_eps
        tied = self._sizes.tied_embeddings
        self.head_name = self.embedding_name if tied else "lm_head.weight"

    def tensor_shapes(self) -> dict[str, Shape]:
        spec, sizes = self._spec, self._sizes
        shapes: dict[str, Shape] = {
            self.embedding_name: (spec.vocab_size, spec.hidden_size),
            self.final_norm_name: (spec.hidden_size,),
            self.head_name: (spec.vocab_size, spec.hidden_size),
        }
        for layer in range(spec.num_layers):
            shapes.update(self._attention_shapes(f"model.layers.{layer}"))
            mlp = f"model.layers.{layer}.mlp"
            if layer not in spec.moe_layers:
                shapes.update(mlp_shapes(mlp, spec.hidden_size, sizes.dense_inner_size))
                continue
            shapes[f"{mlp}.gate.weight"] = (spec.num_experts, spec.hidden_size)
            for expert in range(spec.num_experts):
                prefix = f"{mlp}.experts.{expert}"
                shapes.update(mlp_shapes(prefix, spec.hidden_size, spec.moe_intermediate_size))
        return shapes

    def _attention_shapes(self, prefix: str) -> Iterator[tuple[str, Shape]]:
        hidden_size, sizes = self._spec.hidden_size, self._sizes
        outputs = {"q": sizes.heads_size, "k": sizes.kv_size, "v": sizes.kv_size}
        for name, size in outputs.items():
            yield f"{prefix}.self_attn.{name}_proj.weight", (size, hidden_size)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden_size, sizes.heads_size)
        if sizes.attention_bias:
            for name, size in (*outputs.items(), ("o", hidden_size)):
                yield f"{prefix}.self_attn.{name}_proj.bias", (size,)
        for name in ("q", "k"):
            yield f"{prefix}.self_attn.{name}_norm.weight", (sizes.head_dim,)
        for name in ("input", "post_attention"):
            yield f"{prefix}.{name}_layernorm.weight", (hidden_size,)

    def read_attention(
        self, checkpoint: Checkpoint, kv: KvShape, context_tokens_max: int
    ) -> list[Attention]:
        sizes = self._sizes
        rotations = sizes.rope.rotations(sizes.head_dim, context_tokens_max)
        scratch = GqaScratch(
            hidden_size=self._spec.hidden_size,
            num_heads=sizes.num_heads,
            kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
        )
        return [
            GqaAttention(
                weights=self._attention_weights(checkpoint, layer),
                kv=kv,
                kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                rotations=rotations,
                norm_eps=sizes.norm_eps,
                scratch=scratch,
            )
            for layer in range(self._spec.num_layers)
        ]

    def _attention_weights(self, checkpoint: Checkpoint, layer: int) -> GqaWeights:
        prefix, sizes = f"model.layers.{layer}.self_attn", self._sizes

        def bias(*names: str, size: int) -> Floats:
            if not sizes.attention_bias:
                return np.zeros(size, dtype=np.float32)
            return np.concatenate([checkpoint.read(f"{prefix}.{n}_proj.bias") for n in names])

        return GqaWeights(
            norm_H=read_vector(checkpoint, f"model.layers.{layer}.input_layernorm.weight"),
            w_qkv_HP=read_matrices(checkpoint, *(f"{prefix}.{n}_proj.weight" for n in "qkv")),
            b_qkv_P=bias("q", "k", "v", size=sizes.qkv_size),
            q_norm_D=read_vector(checkpoint, f"{prefix}.q_norm.weight"),
            k_norm_D=read_vector(checkpoint, f"{prefix}.k_norm.weight"),
            w_o_OH=read_matrix(checkpoint, f"{prefix}.o_proj.weight"),
            b_o_H=bias("o", size=self._spec.hidden_size),
        )

    def read_mlp(self, checkpoint: Checkpoint, layer: int) -> MoeLayer | DenseLayer:
        prefix = f"model.layers.{layer}"
        norm_H = read_vector(checkpoint, f"{prefix}.post_attention_layernorm.weight")
        if layer not in self._spec.moe_layers:
            return DenseLayer(norm_H=norm_H, mlp=read_dense(checkpoint, f"{prefix}.mlp"))
        w_router_HE = read_matrix(checkpoint, f"{prefix}.mlp.gate.weight")
        router = SoftmaxRouter(w_router_HE, normalise=self._sizes.normalise_top_k)
        return MoeLayer(norm_H=norm_H, router=router)

    def read_expert(self, checkpoint: Checkpoint, layer: int, expert: int) -> ExpertWeights:
        return read_mlp(checkpoint, f"model.layers.{layer}.mlp.experts.{expert}")


FAMILY = Qwen3Moe
