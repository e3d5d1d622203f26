"""The sizes of a CUDA rank's decoder, which determine its kernels, buffers and caches. Imports no
kernels."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.checkpoint.gqa_shape import GqaShape
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.checkpoint.rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a token's experts are chosen: by softmax, or by sigmoid plus the layer's correction.

    Only the `topk_group` best of `num_groups` groups take part. A group counts by its best expert,
    or with sigmoid by its two best. With `normalise`, the chosen weights sum to one before `factor`
    scales them.
    """

    sigmoid: bool = False
    num_groups: int = 1
    topk_group: int = 1
    normalise: bool = True
    factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSizes:
    """All layers have the same kind of attention. Those with grouped queries may differ in their
    `windows`, which are by layer; if there are none, that of `attention` holds for all.

    `moe_layers` are the layers with experts, as in `ModelSpec`; the layer axis of slots, tables and
    exchange counts only these. The other layers have dense MLPs of `dense_size`. `shared_size` is
    the inner size of all shared experts of a layer together; 0 means none. `clamped_experts` have
    gpt-oss's activation; shared experts and dense layers never do.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    attention: GqaShape | MlaShape
    rope: Rope
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    inner_size: int
    routing: Routing = Routing()
    shared_size: int = 0
    dense_size: int = 0
    norm_eps: float = 1e-6
    windows: tuple[int, ...] = ()
    clamped_experts: bool = False

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def num_slot_layers(self) -> int:
        """As placement counts them: a dense model has one, whose only expert is of size 0."""
        return max(1, self.num_moe_layers)

    def window_of(self, layer: int) -> int:
        """How many positions a row sees, its own included; 0: all."""
        if self.windows:
            return self.windows[layer]
        return self.attention.window if isinstance(self.attention, GqaShape) else 0

    @property
    def heads_size(self) -> int:
        """Values per token that attention passes to the output projection."""
        if isinstance(self.attention, MlaShape):
            return self.attention.heads_size
        return self.attention.q_size

    @property
    def num_expert_weights(self) -> int:
        return 3 * self.inner_size * self.hidden_size

    @property
    def num_shared_weights(self) -> int:
        """Weights that every step reads completely: attention, routers, shared experts, dense
        layers, head."""
        hidden = self.hidden_size
        attention = _attention_values(self.attention, hidden) + self.heads_size * hidden
        moe = (self.num_experts + 3 * self.shared_size) * hidden
        dense = 3 * self.dense_size * hidden
        num_dense = self.num_layers - self.num_moe_layers
        layers = self.num_layers * attention + self.num_moe_layers * moe + num_dense * dense
        return layers + self.vocab_size * hidden

    @property
    def kv_values_per_token(self) -> int:
        """Cached values per token, over all layers."""
        return self._narrow_values_per_token + self._wide_values_per_token

    def kv_bytes_per_token(self, itemsize: int, kv_itemsize: int) -> int:
        """`itemsize`: bytes of a value of the model; `kv_itemsize`: of a cached key, value or
        latent. Of a latent's token the rotated key and the indexer's stay in the model's format."""
        narrow, wide = self._narrow_values_per_token, self._wide_values_per_token
        return narrow * kv_itemsize + wide * itemsize

    @property
    def _narrow_values_per_token(self) -> int:
        shape = self.attention
        own = shape.rank if isinstance(shape, MlaShape) else 2 * shape.kv_size
        return self.num_layers * own

    @property
    def _wide_values_per_token(self) -> int:
        shape = self.attention
        if isinstance(shape, MlaShape):
            return self.num_layers * (shape.qk_rope_head_dim + shape.index_head_dim)
        return 0


def _attention_values(shape: GqaShape | MlaShape, hidden: int) -> int:
    """Weights of a layer's attention without the output projection."""
    if isinstance(shape, GqaShape):
        return (shape.q_size + 2 * shape.kv_size) * hidden
    expanded = shape.num_heads * (shape.qk_nope_head_dim + shape.v_head_dim) * shape.rank
    latent_q = (
        shape.q_lora_rank * (hidden + shape.q_size) if shape.q_lora_rank else shape.q_size * hidden
    )
    indexer = (shape.num_index_heads + shape.index_head_dim) * hidden
    indexer += shape.num_index_heads * shape.index_head_dim * shape.q_lora_rank
    return (shape.rank + shape.qk_rope_head_dim) * hidden + expanded + latent_q + indexer
