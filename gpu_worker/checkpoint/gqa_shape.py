"""The sizes of grouped-query attention in config.json, and the tensors that a checkpoint has for
it. Knows no kernels."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.checkpoint.checkpoint import Shape
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec

QK_NORM_NONE, QK_NORM_HEAD, QK_NORM_WHOLE = 0, 1, 2
"""What queries and keys are normed over: nothing, each head, or all heads together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaShape:
    """The heads of a layer and how they attend. `window` is the number of tokens that a row sees,
    itself included; 0: all. `clip` bounds queries, keys and values; 0: no bound."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: int = QK_NORM_NONE
    window: int = 0
    clip: float = 0.0

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_gqa_shape(spec: ModelSpec, qk_norm: int) -> GqaShape:
    """Raises CheckpointError if sizes are missing or invalid."""
    raw = spec.raw
    try:
        num_heads, num_kv_heads = int(raw["num_attention_heads"]), raw.get("num_key_value_heads")
        shape = GqaShape(
            num_heads=num_heads,
            num_kv_heads=int(num_heads if num_kv_heads is None else num_kv_heads),
            head_dim=int(raw.get("head_dim") or spec.hidden_size // num_heads),
            qk_norm=qk_norm,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json: missing or malformed {error}") from error
    if min(num_heads, shape.num_kv_heads, shape.head_dim) < 1 or shape.head_dim % 2:
        raise CheckpointError("config.json: head counts must be positive and head_dim even")
    if num_heads % shape.num_kv_heads:
        raise CheckpointError(
            "config.json: num_attention_heads must be a multiple of num_key_value_heads"
        )
    return shape


def gqa_shapes(
    prefix: str, hidden_size: int, shape: GqaShape, *, qkv_bias: bool = False, o_bias: bool = False
) -> dict[str, Shape]:
    """Shapes of the tensors under `prefix` (…self_attn), as most families name them."""
    sizes = {"q": shape.q_size, "k": shape.kv_size, "v": shape.kv_size}
    shapes: dict[str, Shape] = {f"{prefix}.{n}_proj.weight": (sizes[n], hidden_size) for n in "qkv"}
    shapes[f"{prefix}.o_proj.weight"] = (hidden_size, shape.q_size)
    if qkv_bias:
        shapes |= {f"{prefix}.{n}_proj.bias": (sizes[n],) for n in "qkv"}
    if o_bias:
        shapes[f"{prefix}.o_proj.bias"] = (hidden_size,)
    if shape.qk_norm == QK_NORM_HEAD:
        shapes |= {f"{prefix}.{n}_norm.weight": (shape.head_dim,) for n in "qk"}
    elif shape.qk_norm == QK_NORM_WHOLE:
        shapes |= {f"{prefix}.{n}_norm.weight": (sizes[n],) for n in "qk"}
    return shapes
