"""The shared weights of a decoder on the device. Routed experts are in slots; see `experts.slots`.

Shape letters: C = (Q + 2J)·D columns of queries, keys and values; O = Q·D (or A·G) input size of
the output projection; J = 2I of an MLP: gate, then up; the rest as in `kernels`. For latent
attention, as in the CPU kernels: A heads, R rank of the cached latent, M rank of the queries'
latent, F the unrotated size of a head's query, W the rotated size, G the size of a head's value.
For its indexer: Y heads, Z the size of each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from gpu_worker.cuda.weights.scaled_blocks import Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaWeights:
    """`w_qkv_CH` holds the projections of queries, keys and values along the first axis, and
    `b_qkv_C` their biases. The norms are `[D]`, for each head by itself, or `[Q·D]` and `[J·D]`,
    for all heads together (J: KV heads). `sinks_Q` has a score for each query head that takes part
    in its softmax; `b_o_H` is the bias of the output projection. Biases and sinks are float32. What
    a model lacks is None."""

    w_qkv_CH: Matrix
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    b_qkv_C: Tensor | None = None
    b_o_H: Tensor | None = None
    sinks_Q: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerWeights:
    """`w_in_CH` multiplies the hidden state: wk, then weights_proj along the first axis (C = Z +
    Y). `w_q_NM` (wq_b, N = Y·Z) multiplies the queries' latent. The norm of keys is float32."""

    w_in_CH: Matrix
    w_q_NM: Matrix
    k_norm_Z: Tensor
    k_bias_Z: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaWeights:
    """`w_in_CH` multiplies the hidden state: q_a_proj, then kv_a_proj_with_mqa along the first axis
    (C = M + R + W). If queries have no latent, q_proj takes the place of q_a_proj
    (C = A·(F + W) + R + W), and `q_norm_M` and `w_q_NM` (q_b_proj, N = A·(F + W)) are None.

    With kv_b_proj viewed as `[A, F + G, R]`, `w_uk_ARF` is the first F rows of each head,
    transposed, and `w_uv_AGR` is the other G. All are contiguous. There are no biases.
    """

    w_in_CH: Matrix
    q_norm_M: Tensor | None
    w_q_NM: Matrix | None
    kv_norm_R: Tensor
    w_uk_ARF: Tensor
    w_uv_AGR: Tensor
    indexer: IndexerWeights | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """A gated MLP that every token goes through: gate_proj, then up_proj; and down_proj."""

    w_gate_up_JH: Matrix
    w_down_HI: Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """`correction_E` (e_score_correction_bias) and `b_router_E` are float32; None if routing has
    none. `shared` is the one MLP that holds all shared experts, as in checkpoints."""

    w_router_EH: Tensor
    b_router_E: Tensor | None = None
    correction_E: Tensor | None = None
    shared: MlpWeights | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """`mlp` is a MoeWeights in the layers `DecoderSizes.moe_layers`, and a MlpWeights in others."""

    input_norm_H: Tensor
    attention: GqaWeights | MlaWeights
    w_o_HO: Matrix
    mlp_norm_H: Tensor
    mlp: MoeWeights | MlpWeights

    @property
    def output_bias(self) -> Tensor | None:
        """Of the output projection."""
        return self.attention.b_o_H if isinstance(self.attention, GqaWeights) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """All matrices and norms have the model's dtype, except those that stay block-scaled FP8."""

    embedding_VH: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_H: Tensor
    w_head_VH: Tensor

    @property
    def num_bytes(self) -> int:
        """On the device."""
        tied = self.w_head_VH is self.embedding_VH
        return _num_bytes(self) - (self.embedding_VH.nbytes if tied else 0)

    @property
    def device(self) -> torch.device:
        return self.embedding_VH.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VH.dtype


def _num_bytes(weights: object) -> int:
    if isinstance(weights, Tensor):
        return weights.nbytes
    if isinstance(weights, tuple):
        return sum(map(_num_bytes, weights))
    if is_dataclass(weights):
        return sum(_num_bytes(getattr(weights, field.name)) for field in fields(weights))
    return 0
