"""Random shared weights of any decoder, for measurements and tests."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.checkpoint.gqa_shape import (
    QK_NORM_HEAD,
    QK_NORM_NONE,
    QK_NORM_WHOLE,
    GqaShape,
)
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import (
    DecoderWeights,
    GqaWeights,
    IndexerWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
)
from gpu_worker.cuda.weights.scaled_blocks import (
    CODES,
    CODES_STD,
    Matrix,
    ScaledBlocks,
    fill_codes,
    num_blocks,
)


def random_weights(
    sizes: DecoderSizes,
    device: torch.device,
    dtype: torch.dtype,
    *,
    std: float = 0.02,
    scaled: bool = False,
    biased: bool = False,
) -> DecoderWeights:
    """Uses the device's default generator. The embedding has unit variance, so that tokens choose
    different experts. With `scaled`, what checkpoints quantise is in block-scaled FP8. `biased`:
    grouped-query attention and routers have biases, and attention has sinks."""
    source = _Source(device, dtype, std, scaled=scaled, biased=biased)
    hidden = sizes.hidden_size
    return DecoderWeights(
        embedding_VH=source.normal(sizes.vocab_size, hidden, std=1.0),
        layers=tuple(source.layer(sizes, layer) for layer in range(sizes.num_layers)),
        final_norm_H=source.norm(hidden),
        w_head_VH=source.normal(sizes.vocab_size, hidden),
    )


class _Source:
    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        std: float,
        *,
        scaled: bool,
        biased: bool,
    ) -> None:
        self._device, self._dtype, self._std = device, dtype, std
        self._scaled, self._biased = scaled, biased

    def normal(self, *shape: int, std: float | None = None) -> Tensor:
        empty = torch.empty(shape, device=self._device, dtype=self._dtype)
        return empty.normal_(std=self._std if std is None else std)

    def matrix(self, rows: int, columns: int) -> Matrix:
        if not self._scaled:
            return self.normal(rows, columns)
        codes = torch.empty((rows, columns), device=self._device, dtype=CODES)
        grid = (num_blocks(rows), num_blocks(columns))
        fill_codes(codes)
        return ScaledBlocks(codes, torch.full(grid, self._std / CODES_STD, device=self._device))

    def bias(self, size: int) -> Tensor | None:
        """In float32; None if there are none."""
        if not self._biased:
            return None
        return torch.empty(size, device=self._device).normal_(std=self._std)

    def norm(self, size: int) -> Tensor:
        return torch.empty(size, device=self._device, dtype=self._dtype).uniform_(0.5, 1.5)

    def layer(self, sizes: DecoderSizes, layer: int) -> LayerWeights:
        hidden, shape = sizes.hidden_size, sizes.attention
        has_experts = layer in sizes.moe_layers
        return LayerWeights(
            input_norm_H=self.norm(hidden),
            attention=self._mla(shape) if isinstance(shape, MlaShape) else self._gqa(shape, hidden),
            w_o_HO=self.matrix(hidden, sizes.heads_size),
            mlp_norm_H=self.norm(hidden),
            mlp=self._moe(sizes) if has_experts else self._mlp(hidden, sizes.dense_size),
        )

    def _gqa(self, shape: GqaShape, hidden: int) -> GqaWeights:
        columns = shape.q_size + 2 * shape.kv_size
        normed = {
            QK_NORM_NONE: (0, 0),
            QK_NORM_HEAD: (shape.head_dim, shape.head_dim),
            QK_NORM_WHOLE: (shape.q_size, shape.kv_size),
        }[shape.qk_norm]
        q_norm, k_norm = (self.norm(size) if size else None for size in normed)
        return GqaWeights(
            w_qkv_CH=self.matrix(columns, hidden),
            q_norm=q_norm,
            k_norm=k_norm,
            b_qkv_C=self.bias(columns),
            b_o_H=self.bias(hidden),
            sinks_Q=self.bias(shape.num_heads),
        )

    def _mla(self, shape: MlaShape) -> MlaWeights:
        columns = (shape.q_lora_rank or shape.q_size) + shape.rank + shape.qk_rope_head_dim
        return MlaWeights(
            w_in_CH=self.matrix(columns, shape.hidden_size),
            q_norm_M=self.norm(shape.q_lora_rank) if shape.q_lora_rank else None,
            w_q_NM=self.matrix(shape.q_size, shape.q_lora_rank) if shape.q_lora_rank else None,
            kv_norm_R=self.norm(shape.rank),
            w_uk_ARF=self.normal(shape.num_heads, shape.rank, shape.qk_nope_head_dim),
            w_uv_AGR=self.normal(shape.num_heads, shape.v_head_dim, shape.rank),
            indexer=self._indexer(shape) if shape.num_index_heads else None,
        )

    def _indexer(self, shape: MlaShape) -> IndexerWeights:
        heads, size = shape.num_index_heads, shape.index_head_dim
        return IndexerWeights(
            w_in_CH=self.normal(size + heads, shape.hidden_size),
            w_q_NM=self.matrix(heads * size, shape.q_lora_rank),
            k_norm_Z=torch.empty(size, device=self._device).uniform_(0.5, 1.5),
            k_bias_Z=torch.empty(size, device=self._device).uniform_(-0.5, 0.5),
        )

    def _moe(self, sizes: DecoderSizes) -> MoeWeights:
        hidden, experts = sizes.hidden_size, sizes.num_experts
        correction_E = torch.empty(experts, device=self._device).uniform_(-0.1, 0.1)
        return MoeWeights(
            w_router_EH=self.normal(experts, hidden, std=hidden**-0.5),
            b_router_E=self.bias(experts),
            correction_E=correction_E if sizes.routing.sigmoid else None,
            shared=self._mlp(hidden, sizes.shared_size) if sizes.shared_size else None,
        )

    def _mlp(self, hidden: int, inner: int) -> MlpWeights:
        return MlpWeights(
            w_gate_up_JH=self.matrix(2 * inner, hidden), w_down_HI=self.matrix(hidden, inner)
        )
