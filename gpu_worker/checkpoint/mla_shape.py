"""The sizes of latent attention in config.json, and the tensors that a checkpoint has for it. Knows
no kernels."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.checkpoint.checkpoint import Shape
from gpu_worker.checkpoint.common_tensors import read_layer_types
from shared.config_defaults import CONFIG_DEFAULTS
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaShape:
    """The sizes of a layer. `q_lora_rank` is 0 if queries have no latent; `num_index_heads` is 0 if
    attention is dense."""

    hidden_size: int
    num_heads: int
    qk_nope_head_dim: int  # unrotated elements of a head's query and key
    qk_rope_head_dim: int
    v_head_dim: int
    rank: int  # of the cached latent
    q_lora_rank: int
    interleaved: bool  # pairs of rotated elements are neighbours
    num_index_heads: int = 0
    index_head_dim: int = 0
    index_top_k: int = 0

    @property
    def q_size(self) -> int:
        return self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)

    @property
    def heads_size(self) -> int:
        return self.num_heads * self.v_head_dim


def read_mla_shape(spec: ModelSpec, *, has_indexer: bool) -> MlaShape:
    """Raises CheckpointError if sizes are missing or invalid."""
    raw = spec.raw
    try:
        shape = MlaShape(
            hidden_size=spec.hidden_size,
            num_heads=int(raw["num_attention_heads"]),
            qk_nope_head_dim=int(raw["qk_nope_head_dim"]),
            qk_rope_head_dim=int(raw["qk_rope_head_dim"]),
            v_head_dim=int(raw["v_head_dim"]),
            rank=int(raw["kv_lora_rank"]),
            q_lora_rank=int(raw.get("q_lora_rank") or 0),
            interleaved=_is_interleaved(spec),
            num_index_heads=int(raw["index_n_heads"]) if has_indexer else 0,
            index_head_dim=int(raw["index_head_dim"]) if has_indexer else 0,
            index_top_k=int(raw["index_topk"]) if has_indexer else 0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: missing or malformed {error}") from error
    if raw.get("num_key_value_heads") not in (None, shape.num_heads):
        raise CheckpointError(
            "config.json: latent attention has as many num_key_value_heads as num_attention_heads"
        )
    sizes = (
        shape.num_heads,
        shape.qk_nope_head_dim,
        shape.qk_rope_head_dim,
        shape.v_head_dim,
        shape.rank,
    )
    if min(sizes) < 1 or shape.qk_rope_head_dim % 2:
        raise CheckpointError("config.json: attention sizes must be positive, the rotated one even")
    if has_indexer:
        read_layer_types(spec, ("indexed_attention",))
    if has_indexer and (shape.q_lora_rank < 1 or shape.index_head_dim < shape.qk_rope_head_dim):
        raise CheckpointError("config.json: the indexer's sizes cannot be")
    return shape


def _is_interleaved(spec: ModelSpec) -> bool:
    """As in transformers, only a family that has the key reads it."""
    has_key = "rope_interleave" in CONFIG_DEFAULTS[spec.architecture]
    return bool(spec.raw["rope_interleave"]) if has_key else True


def mla_shapes(prefix: str, shape: MlaShape, *, bias: bool = False) -> dict[str, Shape]:
    """Shapes of the tensors under `prefix` (…self_attn), without the indexer's."""
    hidden_size = shape.hidden_size
    kv_size = shape.num_heads * (shape.qk_nope_head_dim + shape.v_head_dim)
    kva_size = shape.rank + shape.qk_rope_head_dim
    shapes: dict[str, Shape] = {
        f"{prefix}.kv_a_proj_with_mqa.weight": (kva_size, hidden_size),
        f"{prefix}.kv_a_layernorm.weight": (shape.rank,),
        f"{prefix}.kv_b_proj.weight": (kv_size, shape.rank),
        f"{prefix}.o_proj.weight": (hidden_size, shape.heads_size),
    }
    if shape.q_lora_rank:
        shapes[f"{prefix}.q_a_proj.weight"] = (shape.q_lora_rank, hidden_size)
        shapes[f"{prefix}.q_a_layernorm.weight"] = (shape.q_lora_rank,)
        shapes[f"{prefix}.q_b_proj.weight"] = (shape.q_size, shape.q_lora_rank)
    else:
        shapes[f"{prefix}.q_proj.weight"] = (shape.q_size, hidden_size)
    if bias:
        shapes[f"{prefix}.kv_a_proj_with_mqa.bias"] = (kva_size,)
        shapes[f"{prefix}.o_proj.bias"] = (hidden_size,)
        if shape.q_lora_rank:
            shapes[f"{prefix}.q_a_proj.bias"] = (shape.q_lora_rank,)
    return shapes


def indexer_shapes(prefix: str, shape: MlaShape) -> dict[str, Shape]:
    """Shapes of the tensors under `prefix` (…self_attn.indexer)."""
    hidden_size = shape.hidden_size
    return {
        f"{prefix}.wq_b.weight": (shape.num_index_heads * shape.index_head_dim, shape.q_lora_rank),
        f"{prefix}.wk.weight": (shape.index_head_dim, hidden_size),
        f"{prefix}.k_norm.weight": (shape.index_head_dim,),
        f"{prefix}.k_norm.bias": (shape.index_head_dim,),
        f"{prefix}.weights_proj.weight": (shape.num_index_heads, hidden_size),
    }
