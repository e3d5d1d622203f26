"""A decoder on a CPU rank: the forward over its layers, with the rank's expert slots. The model's
family defines what a layer computes; kernels do the arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.checkpoint import OnRead, open_checkpoint
from gpu_worker.checkpoint.draft_tensors import draft_names, draft_shapes
from gpu_worker.checkpoint.shards import read_tensors
from gpu_worker.cpu.draft_layer import DraftLayer
from gpu_worker.cpu.expert_slots import ExpertSlots, MlpSlot, MlpWeights
from gpu_worker.cpu.family import DenseLayer, Family, Floats, KvShape, MoeLayer
from gpu_worker.cpu.kernels import experts as expert_kernels
from gpu_worker.cpu.kernels import linear as kernels
from gpu_worker.cpu.mlp import MlpRunner
from gpu_worker.cpu.on_demand import OnDemandExperts
from gpu_worker.cpu.step_scratch import TokenScratch
from gpu_worker.cpu.weights import Weights, read_panels, read_vector, weights_dtype
from gpu_worker.engine.step_batch import Forward, StepBatch
from gpu_worker.exchange.interface import Dispatched, Exchange
from shared.model_spec import ModelSpec


class Decoder:
    """Implements `engine.step_batch.Model`, and `DraftModel` if `spec` has a layer that drafts. The
    caller loads a slot before the first step whose map names it."""

    def __init__(
        self,
        *,
        folder: Path,
        spec: ModelSpec,
        family: Family,
        slots_per_rank: int,
        kv: KvShape,
        on_read: OnRead | None = None,
    ) -> None:
        """Reads everything but the experts. Raises CheckpointError."""
        shapes = family.tensor_shapes()
        if spec.draft_layers:
            shapes |= draft_shapes(spec, read_tensors(folder))
        checkpoint = open_checkpoint(folder, shapes, on_read)
        self.spec = spec
        self.context_tokens_max = min(spec.context_tokens_max, kv.num_tokens)
        """Positions must be below this: the model's limit, or the size of the KV cache."""
        self.weights_dtype = weights_dtype(checkpoint)

        def read_expert(layer: int, expert: int, slot: MlpSlot) -> None:
            if spec.moe_layers:  # a dense model has no experts to read
                family.read_expert(checkpoint, spec.moe_layers[layer], expert, slot)

        self.slots = ExpertSlots(
            num_layers=spec.num_moe_layers,
            slots_per_rank=slots_per_rank,
            hidden_size=spec.hidden_size,
            inner_size=spec.moe_intermediate_size,
            read_expert=read_expert,
            dtype=self.weights_dtype,
        )
        self.on_demand = OnDemandExperts(
            first_slot=slots_per_rank,
            hidden_size=spec.hidden_size,
            inner_size=spec.moe_intermediate_size,
            dtype=self.weights_dtype,
            activation=family.expert_activation,
            read_expert=read_expert,
        )
        self._embedding_VH = read_vector(checkpoint, family.embedding_name)
        self._final_norm_H = read_vector(checkpoint, family.final_norm_name)
        self._w_head = read_panels(checkpoint, family.head_name)
        self.attention = family.read_attention(checkpoint, kv, self.context_tokens_max)
        self._mlps = [family.read_mlp(checkpoint, layer) for layer in spec.layers]
        self._layers = list(zip(self.attention, self._mlps, strict=True))
        self._eps = np.float32(family.norm_eps)
        self._draft: DraftLayer | None = None
        if (names := draft_names(spec)) is not None:
            self._draft = DraftLayer(
                checkpoint,
                names,
                embedding_VH=self._embedding_VH,
                w_head=self._w_head,
                final_norm_H=self._final_norm_H,
                norm_eps=self._eps,
            )
        self._zeros_V: Floats = np.zeros(spec.vocab_size, dtype=np.float32)
        self._tokens = TokenScratch(hidden_size=spec.hidden_size, top_k=spec.top_k)
        self._experts = MlpRunner(
            hidden_size=spec.hidden_size,
            inner_size=spec.moe_intermediate_size,
            num_mlps=slots_per_rank,
            activation=family.expert_activation,
        )
        self._dense = {
            inner_size: MlpRunner(
                hidden_size=spec.hidden_size,
                inner_size=inner_size,
                num_mlps=1,
                activation=expert_kernels.SWIGLU,
            )
            for inner_size in {_inner_size(mlp) for mlp in self._mlps}
            if inner_size
        }

    @property
    def num_moe_layers(self) -> int:
        return self.spec.num_moe_layers

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    def forward(self, batch: StepBatch, exchange: Exchange) -> Forward:
        num_tokens = batch.num_tokens
        tokens = self._tokens
        if num_tokens:
            last = int(batch.position_T.max())
            assert last < self.context_tokens_max, "a position beyond the context"
            tokens.grow(num_tokens)
            np.take(self._embedding_VH, batch.token_ids_T, axis=0, out=tokens.x_TH[:num_tokens])
        # Without MoE layers ranks exchange nothing, and each rank sleeps on its own.
        any_work: bool | None = None if self.spec.moe_layers else num_tokens > 0
        any_tokens, all_know_next = num_tokens > 0, False
        moe_layer = 0
        for attention, mlp in self._layers[: self.spec.num_layers]:
            if num_tokens:
                attention.attend(tokens.x_TH, batch)
            if isinstance(mlp, DenseLayer):
                self._run_dense(mlp, num_tokens)
                continue
            dispatched = self._route(mlp, moe_layer, num_tokens, exchange)
            if any_work is None:
                any_work, any_tokens = dispatched.any_work, dispatched.any_tokens
                all_know_next = dispatched.all_know_next
                if not any_tokens:
                    break
            self._run_experts(mlp, moe_layer, dispatched, num_tokens, exchange)
            moe_layer += 1
        logits_RV = self._logits(batch.logits_rows_R, self._final_norm_H, self._w_head)
        return Forward(
            logits_RV=logits_RV,
            any_work=bool(any_work),
            any_tokens=any_tokens,
            all_know_next=all_know_next,
        )

    def draft(
        self,
        batch: StepBatch,
        next_ids_T: NDArray[np.int32],
        rows_R: NDArray[np.int32],
        exchange: Exchange,
    ) -> Floats:
        draft, tokens, num_tokens = self._draft, self._tokens, batch.num_tokens
        assert draft is not None, "the model drafts nothing"
        attention, mlp = self._layers[-1]
        assert isinstance(mlp, MoeLayer), "a layer that drafts has experts"
        if num_tokens:
            draft.join(tokens.x_TH, next_ids_T, tokens.h_TH)
            attention.attend(tokens.x_TH, batch)
        moe_layer = self.num_moe_layers - 1
        dispatched = self._route(mlp, moe_layer, num_tokens, exchange)
        self._run_experts(mlp, moe_layer, dispatched, num_tokens, exchange)
        return self._logits(rows_R, draft.norm_H, draft.w_head)

    def _route(
        self, mlp: MoeLayer, moe_layer: int, num_tokens: int, exchange: Exchange
    ) -> Dispatched:
        tokens = self._tokens
        if num_tokens:
            kernels.norm_rows(tokens.x_TH, mlp.norm_H, self._eps, tokens.h_TH, num_tokens)
            mlp.router.route(tokens.h_TH, tokens.experts_TK, tokens.weights_TK, num_tokens)
        return exchange.dispatch(
            moe_layer, tokens.h_TH[:num_tokens], tokens.experts_TK[:num_tokens]
        )

    def _computed(self, moe_layer: int, dispatched: Dispatched) -> Floats:
        x_MH, weights = dispatched.x_MH, self.slots.weights(moe_layer)
        if not self.on_demand.is_used:
            return self._experts.run(x_MH, dispatched.rows_N, dispatched.slots_N, weights)
        return self.on_demand.run(
            moe_layer,
            x_MH,
            dispatched.rows_N,
            dispatched.slots_N,
            lambda rows_N, slots_N: self._experts.run(x_MH, rows_N, slots_N, weights),
        )

    def _run_experts(
        self,
        mlp: MoeLayer,
        moe_layer: int,
        dispatched: Dispatched,
        num_tokens: int,
        exchange: Exchange,
    ) -> None:
        y_NH = self._computed(moe_layer, dispatched)
        y_TKH = exchange.combine(moe_layer, y_NH)
        if num_tokens:
            tokens = self._tokens
            expert_kernels.add_weighted(tokens.x_TH, y_TKH, tokens.weights_TK, num_tokens)
            if mlp.shared is not None:
                self._add_mlp(mlp.shared, num_tokens)

    def _run_dense(self, layer: DenseLayer, num_tokens: int) -> None:
        tokens = self._tokens
        if num_tokens:
            kernels.norm_rows(tokens.x_TH, layer.norm_H, self._eps, tokens.h_TH, num_tokens)
            self._add_mlp(layer.mlp, num_tokens)

    def _add_mlp(self, weights: MlpWeights, num_tokens: int) -> None:
        """x += mlp(h)."""
        tokens = self._tokens
        y_TH = self._dense[weights.w_down.shape[2]].run(
            tokens.h_TH, tokens.rows_T[:num_tokens], tokens.zeros_T[:num_tokens], weights
        )
        kernels.add_rows(tokens.x_TH, y_TH, num_tokens)

    def _logits(self, rows_R: NDArray[np.int32], norm_H: Floats, w_head: Weights) -> Floats:
        """`[rows, vocabulary]`, float32: a new array, which the sampler may keep during the next
        step."""
        logits_RV: Floats = np.empty((rows_R.shape[0], self.vocab_size), dtype=np.float32)
        if rows_R.shape[0]:
            kernels.head_logits(
                self._tokens.x_TH,
                rows_R,
                norm_H,
                w_head,
                self._zeros_V,
                self._eps,
                self._tokens.h_TH,
                logits_RV,
            )
        return logits_RV


def _inner_size(mlp: MoeLayer | DenseLayer) -> int:
    """The inner size of the MLP that every token goes through; 0 if there is none."""
    weights = mlp.mlp if isinstance(mlp, DenseLayer) else mlp.shared
    return 0 if weights is None else int(weights.w_down.shape[2])
