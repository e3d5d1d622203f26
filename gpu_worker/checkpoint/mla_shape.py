"""The sizes of latent attention by config.json, and the tensors that a checkpoint has for them.
Knows no kernels."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.checkpoint.checkpoint import Shape
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaShape:
    """Sizes of a layer. `q_rank` is 0 where queries have no latent; `index_heads` is 0 where
    attention is dense."""

    hidden_size: int
    num_heads: int
    plain_size: int  # of a head's query and key that is not rotated
    rotated_size: int
    value_size: int
    rank: int  # of the cached latent
    q_rank: int
    interleaved: bool  # pairs of rotated elements are neighbours
    index_heads: int = 0
    index_size: int = 0
    index_top_k: int = 0

    @property
    def q_size(self) -> int:
        return self.num_heads * (self.plain_size + self.rotated_size)

    @property
    def heads_size(self) -> int:
        return self.num_heads * self.value_size


def read_mla_shape(spec: ModelSpec, *, has_indexer: bool) -> MlaShape:
    """Raises CheckpointError where sizes are missing or cannot be."""
    raw = spec.raw
    try:
        shape = MlaShape(
            hidden_size=spec.hidden_size,
            num_heads=int(raw["num_attention_heads"]),
            plain_size=int(raw["qk_nope_head_dim"]),
            rotated_size=int(raw["qk_rope_head_dim"]),
            value_size=int(raw["v_head_dim"]),
            rank=int(raw["kv_lora_rank"]),
            q_rank=int(raw.get("q_lora_rank") or 0),
            interleaved=bool(raw.get("rope_interleave", True)),
            index_heads=int(raw["index_n_heads"]) if has_indexer else 0,
            index_size=int(raw["index_head_dim"]) if has_indexer else 0,
            index_top_k=int(raw["index_topk"]) if has_indexer else 0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: missing or malformed {error}") from error
    sizes = (shape.num_heads, shape.plain_size, shape.rotated_size, shape.value_size, shape.rank)
    if min(sizes) < 1 or shape.rotated_size % 2:
        raise CheckpointError("config.json: attention sizes must be positive, the rotated one even")
    if has_indexer and (shape.q_rank < 1 or shape.index_size < shape.rotated_size):
        raise CheckpointError("config.json: the indexer's sizes cannot be")
    return shape


def mla_shapes(prefix: str, shape: MlaShape, *, bias: bool = False) -> dict[str, Shape]:
    """Tensors of `prefix` (…self_attn), without the indexer's."""
    hidden_size = shape.hidden_size
    kv_size = shape.num_heads * (shape.plain_size + shape.value_size)
    kva_size = shape.rank + shape.rotated_size
    shapes: dict[str, Shape] = {
        f"{prefix}.kv_a_proj_with_mqa.weight": (kva_size, hidden_size),
        f"{prefix}.kv_a_layernorm.weight": (shape.rank,),
        f"{prefix}.kv_b_proj.weight": (kv_size, shape.rank),
        f"{prefix}.o_proj.weight": (hidden_size, shape.heads_size),
    }
    if shape.q_rank:
        shapes[f"{prefix}.q_a_proj.weight"] = (shape.q_rank, hidden_size)
        shapes[f"{prefix}.q_a_layernorm.weight"] = (shape.q_rank,)
        shapes[f"{prefix}.q_b_proj.weight"] = (shape.q_size, shape.q_rank)
    else:
        shapes[f"{prefix}.q_proj.weight"] = (shape.q_size, hidden_size)
    if bias:
        shapes[f"{prefix}.kv_a_proj_with_mqa.bias"] = (kva_size,)
        shapes[f"{prefix}.o_proj.bias"] = (hidden_size,)
        if shape.q_rank:
            shapes[f"{prefix}.q_a_proj.bias"] = (shape.q_rank,)
    return shapes


def indexer_shapes(prefix: str, shape: MlaShape) -> dict[str, Shape]:
    """Tensors of `prefix` (…self_attn.indexer)."""
    hidden_size = shape.hidden_size
    return {
        f"{prefix}.wq_b.weight": (shape.index_heads * shape.index_size, shape.q_rank),
        f"{prefix}.wk.weight": (shape.index_size, hidden_size),
        f"{prefix}.k_norm.weight": (shape.index_size,),
        f"{prefix}.k_norm.bias": (shape.index_size,),
        f"{prefix}.weights_proj.weight": (shape.index_heads, hidden_size),
    }
