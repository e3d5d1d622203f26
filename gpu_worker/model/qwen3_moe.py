"""Qwen3-MoE on a CPU rank: the forward over its layers, with the rank's KV cache and expert slots.
What the layers compute is in `kernels`; where the weights come from in `qwen3_moe_weights`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange.seam import Dispatched, Exchange
from gpu_worker.model import kernels
from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.expert_slots import ExpertSlots
from gpu_worker.model.kv_cache import KvCache
from gpu_worker.model.qwen3_moe_weights import (
    AttentionWeights,
    DenseWeights,
    Floats,
    Qwen3MoeSizes,
    read_attention,
    read_dense,
    read_expert,
    read_matrix,
    read_sizes,
    read_vector,
    tensor_shapes,
)
from gpu_worker.model.step_scratch import PairScratch, TokenScratch
from gpu_worker.step_batch import Forward, StepBatch
from shared.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """`moe_layer` is the layer's index among the MoE layers, or None where `dense` is set."""

    attention: AttentionWeights
    mlp_norm_H: Floats
    moe_layer: int | None
    w_router_HE: Floats
    dense: DenseWeights | None


class Qwen3Moe:
    """Implements `gpu_worker.step_batch.Model`. `slots` is filled by the caller before the first
    step that a map names it in."""

    def __init__(
        self,
        *,
        folder: Path,
        spec: ModelSpec,
        slots_per_rank: int,
        kv_blocks: int,
        block_tokens: int,
    ) -> None:
        """Reads everything but the experts. Raises CheckpointError."""
        sizes = read_sizes(spec)
        checkpoint = open_checkpoint(folder, tensor_shapes(spec, sizes))
        self.spec = spec
        self._sizes = sizes
        self.kv_cache = KvCache(
            num_layers=spec.num_layers,
            num_blocks=kv_blocks,
            block_tokens=block_tokens,
            kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
        )
        self.slots = ExpertSlots(
            num_layers=spec.num_moe_layers,
            slots_per_rank=slots_per_rank,
            hidden_size=spec.hidden_size,
            inner_size=spec.moe_intermediate_size,
            read_expert=lambda layer, expert: read_expert(
                checkpoint, spec.moe_layers[layer], expert
            ),
        )
        self._embedding_VH = read_vector(checkpoint, "model.embed_tokens.weight")
        self._final_norm_H = read_vector(checkpoint, "model.norm.weight")
        head = "model.embed_tokens.weight" if sizes.tied_embeddings else "lm_head.weight"
        self._w_head_HV = read_matrix(checkpoint, head)
        self._layers = [
            _Layer(
                attention=read_attention(checkpoint, layer, spec, sizes),
                mlp_norm_H=read_vector(
                    checkpoint, f"model.layers.{layer}.post_attention_layernorm.weight"
                ),
                moe_layer=spec.moe_layers.index(layer) if layer in spec.moe_layers else None,
                w_router_HE=read_matrix(checkpoint, f"model.layers.{layer}.mlp.gate.weight")
                if layer in spec.moe_layers
                else np.zeros((0, 0), dtype=np.float32),
                dense=None if layer in spec.moe_layers else read_dense(checkpoint, layer),
            )
            for layer in range(spec.num_layers)
        ]
        context_tokens = min(spec.context_tokens_max, self.kv_cache.num_tokens)
        self._cos_CD, self._sin_CD = _rotations(sizes, context_tokens)
        self._allocate_scratch()

    def _allocate_scratch(self) -> None:
        spec, sizes = self.spec, self._sizes
        self._tokens = TokenScratch(
            hidden_size=spec.hidden_size,
            qkv_size=sizes.qkv_size,
            heads_size=sizes.heads_size,
            heads_per_kv_head=sizes.num_heads // sizes.num_kv_heads,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
        )
        self._pairs = PairScratch(
            hidden_size=spec.hidden_size,
            inner_size=spec.moe_intermediate_size,
            num_slots=self.slots.slots_per_rank,
        )
        self._dense_pairs = PairScratch(
            hidden_size=spec.hidden_size, inner_size=sizes.dense_inner_size, num_slots=1
        )
        widest = max(
            spec.vocab_size,
            spec.hidden_size,
            spec.num_experts,
            2 * max(spec.moe_intermediate_size, sizes.dense_inner_size),
        )
        self._zeros: Floats = np.zeros(widest, dtype=np.float32)
        self._eps = np.float32(sizes.norm_eps)
        self._scale = np.float32(sizes.head_dim**-0.5)

    @property
    def num_moe_layers(self) -> int:
        return self.spec.num_moe_layers

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def context_tokens_max(self) -> int:
        """Positions must stay below: the model's own limit, or the whole KV cache."""
        return int(self._cos_CD.shape[0])

    def forward(self, batch: StepBatch, exchange: Exchange) -> Forward:
        num_tokens = batch.num_tokens
        tokens = self._tokens
        if num_tokens:
            context = int(batch.position_T.max()) + 1
            assert context <= self.context_tokens_max, "a position beyond the context"
            block_tokens = self.kv_cache.block_tokens
            tokens.grow(num_tokens=num_tokens, context_tokens=context + block_tokens)
            np.take(self._embedding_VH, batch.token_ids_T, axis=0, out=tokens.x_TH[:num_tokens])
        any_work: bool | None = None
        for index, layer in enumerate(self._layers):
            if num_tokens:
                self._attend(index, layer.attention, batch)
            if layer.moe_layer is None:
                self._run_dense(layer, num_tokens)
                continue
            dispatched = self._route(layer, layer.moe_layer, num_tokens, exchange)
            if any_work is None:
                any_work = dispatched.any_work
                if not dispatched.any_tokens:
                    break
            self._run_experts(layer.moe_layer, dispatched, num_tokens, exchange)
        return Forward(logits_RV=self._logits(batch.logits_rows_R), any_work=bool(any_work))

    def _attend(self, index: int, weights: AttentionWeights, batch: StepBatch) -> None:
        tokens = self._tokens
        kernels.attend(
            tokens.x_TH,
            batch.position_T,
            batch.sequence_T,
            batch.block_tables_SB,
            self.kv_cache.k_LBJDU[index],
            self.kv_cache.v_LBJUD[index],
            *weights,
            self._cos_CD,
            self._sin_CD,
            self._eps,
            self._scale,
            tokens.h_TH,
            tokens.qkv_TP,
            tokens.heads_TO,
            tokens.scores_GC,
        )

    def _route(
        self, layer: _Layer, moe_layer: int, num_tokens: int, exchange: Exchange
    ) -> Dispatched:
        tokens = self._tokens
        if num_tokens:
            kernels.route(
                tokens.x_TH,
                layer.mlp_norm_H,
                layer.w_router_HE,
                self._zeros,
                self._eps,
                self._sizes.normalise_top_k,
                tokens.h_TH,
                tokens.router_TE,
                tokens.experts_TK,
                tokens.weights_TK,
                num_tokens,
            )
        return exchange.dispatch(
            moe_layer, tokens.h_TH[:num_tokens], tokens.experts_TK[:num_tokens]
        )

    def _run_experts(
        self, moe_layer: int, dispatched: Dispatched, num_tokens: int, exchange: Exchange
    ) -> None:
        y_NH = self._compute(
            self._pairs,
            dispatched.x_MH,
            dispatched.rows_N,
            dispatched.slots_N,
            self.slots.w_gate_up_LSHJ[moe_layer],
            self.slots.w_down_LSIH[moe_layer],
        )
        y_TKH = exchange.combine(moe_layer, y_NH)
        if num_tokens:
            tokens = self._tokens
            kernels.add_weighted(tokens.x_TH, y_TKH, tokens.weights_TK, num_tokens)

    def _run_dense(self, layer: _Layer, num_tokens: int) -> None:
        tokens = self._tokens
        if not num_tokens or layer.dense is None:
            return
        kernels.norm_rows(tokens.x_TH, layer.mlp_norm_H, self._eps, tokens.h_TH, num_tokens)
        y_TH = self._compute(
            self._dense_pairs,
            tokens.h_TH,
            tokens.rows_T[:num_tokens],
            tokens.zeros_T[:num_tokens],
            *layer.dense,
        )
        kernels.add_rows(tokens.x_TH, y_TH, num_tokens)

    def _compute(
        self,
        pairs: PairScratch,
        x_MH: Floats,
        rows_N: NDArray[np.int32],
        slots_N: NDArray[np.int32],
        w_gate_up_SHJ: Floats,
        w_down_SIH: Floats,
    ) -> Floats:
        """The outputs of (row, slot) pairs; valid until the next call."""
        num_pairs = rows_N.shape[0]
        pairs.grow(num_pairs)
        if num_pairs:
            kernels.run_experts(
                x_MH,
                rows_N,
                slots_N,
                w_gate_up_SHJ,
                w_down_SIH,
                self._zeros,
                pairs.y_NH,
                pairs.order_N,
                pairs.ends_S,
                pairs.x_NH,
                pairs.gate_up_NJ,
                pairs.inner_NI,
                pairs.out_NH,
            )
        return pairs.y_NH[:num_pairs]

    def _logits(self, rows_R: NDArray[np.int32]) -> Floats:
        """A new array: the sampler may keep it over the next step."""
        logits_RV: Floats = np.empty((rows_R.shape[0], self.vocab_size), dtype=np.float32)
        if rows_R.shape[0]:
            kernels.head_logits(
                self._tokens.x_TH,
                rows_R,
                self._final_norm_H,
                self._w_head_HV,
                self._zeros,
                self._eps,
                self._tokens.h_TH,
                logits_RV,
            )
        return logits_RV


def _rotations(sizes: Qwen3MoeSizes, context_tokens: int) -> tuple[Floats, Floats]:
    """Cosines and sines by position, `[C, D/2]`. The angles are rounded to float32 as in the
    reference, their functions are exact, so that all machines agree."""
    exponents = np.arange(0, sizes.head_dim, 2, dtype=np.float32) / np.float32(sizes.head_dim)
    powers = np.power(sizes.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    positions = np.arange(context_tokens, dtype=np.float32)
    angles = (positions[:, None] * (np.float32(1.0) / powers)[None, :]).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
