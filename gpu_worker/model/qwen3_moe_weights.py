"""The Qwen3-MoE architecture on disk: its sizes, what its tensors are called and how they are
shaped, and reading a layer's into the layout that the kernels want. Computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_worker.model.checkpoint import Checkpoint, Shape
from gpu_worker.model.expert_slots import ExpertWeights
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3MoeSizes:
    """What config.json says beyond ModelSpec."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dense_inner_size: int
    rope_theta: float
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


def read_sizes(spec: ModelSpec) -> Qwen3MoeSizes:
    """Raises CheckpointError where config.json is malformed or asks for what is not built."""
    raw = spec.raw
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    _refuse_unsupported(spec, rope)
    try:
        num_heads = int(raw["num_attention_heads"])
        sizes = Qwen3MoeSizes(
            num_heads=num_heads,
            num_kv_heads=int(raw["num_key_value_heads"]),
            head_dim=int(raw.get("head_dim") or spec.hidden_size // num_heads),
            dense_inner_size=int(raw.get("intermediate_size", 0)),
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
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


def _refuse_unsupported(spec: ModelSpec, rope: Any) -> None:
    raw = spec.raw
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    reasons = {
        f"rope scaling {rope_type!r}": rope_type != "default",
        "sliding-window attention": bool(raw.get("use_sliding_window", False)),
        f"activation {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "quantised weights": raw.get("quantization_config") is not None,
        "a model without expert layers": not spec.moe_layers,
        f"top-{spec.top_k} of {spec.num_experts} experts": spec.top_k > spec.num_experts,
    }
    for reason, applies in reasons.items():
        if applies:
            raise CheckpointError(f"config.json asks for {reason}, which Starfish does not serve")


def tensor_shapes(spec: ModelSpec, sizes: Qwen3MoeSizes) -> dict[str, Shape]:
    """Every tensor that a complete checkpoint has, by its Hugging Face name."""
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (spec.vocab_size, spec.hidden_size),
        "model.norm.weight": (spec.hidden_size,),
    }
    if not sizes.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    for layer in range(spec.num_layers):
        shapes.update(_attention_shapes(layer, spec, sizes))
        mlp = f"model.layers.{layer}.mlp"
        if layer in spec.moe_layers:
            shapes[f"{mlp}.gate.weight"] = (spec.num_experts, spec.hidden_size)
            for expert in range(spec.num_experts):
                shapes.update(_mlp_shapes(f"{mlp}.experts.{expert}", spec, sparse=True))
        else:
            shapes.update(_mlp_shapes(mlp, spec, sparse=False, inner=sizes.dense_inner_size))
    return shapes


def _attention_shapes(
    layer: int, spec: ModelSpec, sizes: Qwen3MoeSizes
) -> Iterator[tuple[str, Shape]]:
    prefix = f"model.layers.{layer}"
    outputs = {"q": sizes.heads_size, "k": sizes.kv_size, "v": sizes.kv_size}
    for name, size in outputs.items():
        yield f"{prefix}.self_attn.{name}_proj.weight", (size, spec.hidden_size)
    yield f"{prefix}.self_attn.o_proj.weight", (spec.hidden_size, sizes.heads_size)
    if sizes.attention_bias:
        for name, size in (*outputs.items(), ("o", spec.hidden_size)):
            yield f"{prefix}.self_attn.{name}_proj.bias", (size,)
    for name in ("q", "k"):
        yield f"{prefix}.self_attn.{name}_norm.weight", (sizes.head_dim,)
    for name in ("input", "post_attention"):
        yield f"{prefix}.{name}_layernorm.weight", (spec.hidden_size,)


def _mlp_shapes(
    prefix: str, spec: ModelSpec, *, sparse: bool, inner: int = 0
) -> Iterator[tuple[str, Shape]]:
    inner = spec.moe_intermediate_size if sparse else inner
    yield f"{prefix}.gate_proj.weight", (inner, spec.hidden_size)
    yield f"{prefix}.up_proj.weight", (inner, spec.hidden_size)
    yield f"{prefix}.down_proj.weight", (spec.hidden_size, inner)


class AttentionWeights(NamedTuple):
    """A layer's attention and the norm before it; matrices are `[inputs, outputs]`."""

    norm_H: Floats
    w_qkv_HP: Floats
    b_qkv_P: Floats
    q_norm_D: Floats
    k_norm_D: Floats
    w_o_OH: Floats
    b_o_H: Floats


class DenseWeights(NamedTuple):
    """A dense layer's MLP, as the one expert of a leading axis of 1."""

    w_gate_up_1HJ: Floats
    w_down_1IH: Floats


def read_attention(
    checkpoint: Checkpoint, layer: int, spec: ModelSpec, sizes: Qwen3MoeSizes
) -> AttentionWeights:
    prefix = f"model.layers.{layer}.self_attn"

    def bias(*names: str, size: int) -> Floats:
        if not sizes.attention_bias:
            return np.zeros(size, dtype=np.float32)
        return np.concatenate([checkpoint.read(f"{prefix}.{n}_proj.bias") for n in names])

    qkv = [checkpoint.read(f"{prefix}.{name}_proj.weight") for name in ("q", "k", "v")]
    return AttentionWeights(
        norm_H=read_vector(checkpoint, f"model.layers.{layer}.input_layernorm.weight"),
        w_qkv_HP=np.ascontiguousarray(np.concatenate(qkv).T),
        b_qkv_P=bias("q", "k", "v", size=sizes.qkv_size),
        q_norm_D=read_vector(checkpoint, f"{prefix}.q_norm.weight"),
        k_norm_D=read_vector(checkpoint, f"{prefix}.k_norm.weight"),
        w_o_OH=read_matrix(checkpoint, f"{prefix}.o_proj.weight"),
        b_o_H=bias("o", size=spec.hidden_size),
    )


def read_expert(checkpoint: Checkpoint, layer: int, expert: int) -> ExpertWeights:
    """`layer` counts all decoder layers."""
    return _read_mlp(checkpoint, f"model.layers.{layer}.mlp.experts.{expert}")


def read_dense(checkpoint: Checkpoint, layer: int) -> DenseWeights:
    mlp = _read_mlp(checkpoint, f"model.layers.{layer}.mlp")
    gate_up_JH = np.concatenate([mlp.gate_IH, mlp.up_IH])
    return DenseWeights(
        w_gate_up_1HJ=np.ascontiguousarray(gate_up_JH.T)[None],
        w_down_1IH=np.ascontiguousarray(mlp.down_HI.T)[None],
    )


def _read_mlp(checkpoint: Checkpoint, prefix: str) -> ExpertWeights:
    return ExpertWeights(
        gate_IH=checkpoint.read(f"{prefix}.gate_proj.weight"),
        up_IH=checkpoint.read(f"{prefix}.up_proj.weight"),
        down_HI=checkpoint.read(f"{prefix}.down_proj.weight"),
    )


def read_vector(checkpoint: Checkpoint, name: str) -> Floats:
    """A writable copy of our own."""
    return np.array(checkpoint.read(name))


def read_matrix(checkpoint: Checkpoint, name: str) -> Floats:
    """Transposed to `[inputs, outputs]`."""
    return np.array(checkpoint.read(name).T, order="C")
