"""The model in plain PyTorch: Qwen3-MoE, all experts of a layer in one grouped matrix product.

Parameter names are those of Hugging Face; only the experts are stacked (`export.py` parts them).
Shapes: B batch, T positions, D hidden, H heads, d head size, N tokens (B*T), M token-expert pairs,
E experts, K experts per token, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """`num_experts == num_experts_per_tok` makes the layer dense: every token uses all of it."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 80
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    dropout: float = 0.0


class Routing(NamedTuple):
    """What the router decided, for the load-balancing loss and the usage figures."""

    probabilities_NE: Tensor
    ids_NK: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def rotate(x_BHTd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    left, right = x_BHTd.chunk(2, dim=-1)
    return x_BHTd * cos_Td + torch.cat([-right, left], dim=-1) * sin_Td


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.dropout = c.dropout
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        heads = (B, T, -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2), cos_Td, sin_Td)
        k = rotate(self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2), cos_Td, sin_Td)
        v = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def grouped_matmul(x_MD: Tensor, weights_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of expert e, which end at ends_E[e], times its matrix."""
    if x_MD.is_cuda:
        return F.grouped_mm(x_MD, weights_EDF.bfloat16(), offs=ends_E)
    starts = [0, *ends_E.tolist()]
    return torch.cat(
        [x_MD[a:b] @ w for a, b, w in zip(starts, starts[1:], weights_EDF, strict=False)]
    )


class Experts(nn.Module):
    """SwiGLU experts. Tokens are sorted into one block for each expert; none is dropped."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        E, D, width = c.num_experts, c.hidden_size, c.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(E, D, 2 * width))
        self.down = nn.Parameter(torch.empty(E, width, D))

    def forward(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        N, K = ids_NK.shape
        x_ND = x_ND.bfloat16() if x_ND.is_cuda else x_ND
        flat = ids_NK.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.zeros(self.gate_up.shape[0], device=flat.device, dtype=torch.int32)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        ends_E = counts.cumsum(0, dtype=torch.int32)
        gate, up = grouped_matmul(x_ND[order // K], self.gate_up, ends_E).chunk(2, dim=-1)
        y = grouped_matmul(F.silu(gate) * up, self.down, ends_E)
        inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(N * K, device=order.device)
        )
        return (y[inverse].view(N, K, -1) * weights_NK.unsqueeze(-1).to(y.dtype)).sum(dim=1)


class SparseMoe(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.top_k = c.num_experts_per_tok
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = Experts(c)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        with torch.autocast(
            x_ND.device.type, enabled=False
        ):  # a bf16 router would decide differently when served
            probabilities = F.linear(x_ND.float(), self.gate.weight.float()).softmax(dim=-1)
        weights, ids = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(x_ND, ids, weights).view_as(x_BTD), Routing(probabilities, ids)


class DenseMlp(nn.Module):
    """The baseline's layer: as wide as the experts that one token uses."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        width = c.num_experts_per_tok * c.moe_intermediate_size
        self.gate_up = nn.Linear(c.hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, c.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, None]:
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up), None


class Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = DenseMlp(c) if c.num_experts == c.num_experts_per_tok else SparseMoe(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routing | None]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        y, routing = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(y), routing


class Model(nn.Module):
    """The embedding doubles as the output matrix (tie_word_embeddings)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([Layer(c) for _ in range(c.num_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        inverse = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.arange(c.max_position_embeddings)[:, None] * inverse.repeat(2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("o_proj.weight", "down", "down.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / (2 * c.num_layers) ** 0.5 if residual else 0.02
                )

    def forward(self, ids_BT: Tensor) -> tuple[Tensor, list[Routing]]:
        T = ids_BT.shape[1]
        x = self.embed_tokens(ids_BT)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, self.cos[:T], self.sin[:T])
            if routing is not None:
                routings.append(routing)
        return F.linear(self.norm(x), self.embed_tokens.weight), routings

    def num_active_parameters(self) -> int:
        experts = sum(p.numel() for n, p in self.named_parameters() if ".experts." in n)
        total = sum(p.numel() for p in self.parameters())
        return (
            total - experts + experts * self.config.num_experts_per_tok // self.config.num_experts
        )


def balance_loss(routings: list[Routing]) -> Tensor:
    """1 when every expert of every layer gets its equal share (Switch Transformer's loss)."""
    losses = []
    for probabilities_NE, ids_NK in routings:
        E = probabilities_NE.shape[1]
        counts = torch.zeros(E, device=ids_NK.device).scatter_add_(
            0, ids_NK.reshape(-1), torch.ones(ids_NK.numel(), device=ids_NK.device)
        )
        losses.append(E * (counts / ids_NK.numel() * probabilities_NE.mean(dim=0)).sum())
    return torch.stack(losses).mean()
