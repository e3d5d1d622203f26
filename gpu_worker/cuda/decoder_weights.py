"""The shared weights of a GQA decoder on the device, and random ones of any size. Experts live in
slots; see `slots`.

Shape letters: C = (Q + 2J)·D columns of queries, keys and values; the rest as in `kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSizes:
    """Qwen3-MoE's shape: every layer has experts, queries and keys a norm per head."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    inner_size: int
    vocab_size: int
    norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    normalise_top_k: bool = True

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def heads_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def expert_values(self) -> int:
        return 3 * self.inner_size * self.hidden_size

    @property
    def shared_values(self) -> int:
        """Weights that every step reads whole: attention, routers, head."""
        layer = (self.qkv_size + self.heads_size + self.num_experts) * self.hidden_size
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    input_norm_H: Tensor
    w_qkv_CH: Tensor
    q_norm_D: Tensor
    k_norm_D: Tensor
    w_o_HO: Tensor
    mlp_norm_H: Tensor
    w_router_EH: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    embedding_VH: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_H: Tensor
    w_head_VH: Tensor

    @property
    def device(self) -> torch.device:
        return self.embedding_VH.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VH.dtype


def random_weights(
    sizes: DecoderSizes, device: torch.device, dtype: torch.dtype, *, std: float = 0.02
) -> DecoderWeights:
    """By torch's generator of the device. The embedding has unit variance, so that tokens differ
    in which experts they choose."""

    def normal(*shape: int, scale: float = std) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=scale)

    def norm(size: int) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).uniform_(0.5, 1.5)

    hidden = sizes.hidden_size

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm_H=norm(hidden),
            w_qkv_CH=normal(sizes.qkv_size, hidden),
            q_norm_D=norm(sizes.head_dim),
            k_norm_D=norm(sizes.head_dim),
            w_o_HO=normal(hidden, sizes.heads_size),
            mlp_norm_H=norm(hidden),
            w_router_EH=normal(sizes.num_experts, hidden, scale=hidden**-0.5),
        )

    return DecoderWeights(
        embedding_VH=normal(sizes.vocab_size, hidden, scale=1.0),
        layers=tuple(layer() for _ in range(sizes.num_layers)),
        final_norm_H=norm(hidden),
        w_head_VH=normal(sizes.vocab_size, hidden),
    )


def rotations(sizes: DecoderSizes, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines by position, float32 `[context, D/2]`; angles rounded to float32 as in the
    reference."""
    exponents = torch.arange(0, sizes.head_dim, 2, dtype=torch.float32) / sizes.head_dim
    frequencies = 1.0 / torch.pow(sizes.rope_theta, exponents)
    angles = torch.arange(context, dtype=torch.float32)[:, None] * frequencies[None, :]
    return (
        angles.double().cos().float().to(device).contiguous(),
        angles.double().sin().float().to(device).contiguous(),
    )
