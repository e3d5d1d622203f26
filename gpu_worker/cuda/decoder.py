"""A GQA decoder with experts on one CUDA rank: decode under CUDA graphs for a ladder of batch
sizes, prefill in chunks through the same kernels, tokens sampled on the device.

Graphs hold addresses, never values: expert map, slots, block tables and batch change in place, so a
death, a heal or a rejoin needs no capture. A step makes one copy to the device and one back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.cuda.decoder_sizes import DecoderSizes
from gpu_worker.cuda.decoder_weights import DecoderWeights, GqaWeights, MoeWeights
from gpu_worker.cuda.kernels import attention, residual, routing, sampling
from gpu_worker.cuda.kernels.linear import linear_parts
from gpu_worker.cuda.moe_stage import MoeStage, Onward, Routed, slot_table
from gpu_worker.cuda.row_draw import RowDraw
from gpu_worker.cuda.step_buffers import StepBuffers
from gpu_worker.cuda.step_inputs import StepInputs, StepSize
from gpu_worker.model.gqa_shape import GqaShape
from gpu_worker.step_batch import StepBatch

DECODE_LADDER = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderOptions:
    """`invariant`: dense products in fixed parts, so that a row's bits do not depend on its batch;
    without it they are the library's."""

    kv_blocks: int
    block_tokens: int = 16
    context_tokens_max: int = 4096
    decode_ladder: tuple[int, ...] = DECODE_LADDER
    prefill_tokens: int = 512
    prefill_sequences: int = 64
    invariant: bool = True


class PendingStep:
    """A step in flight: `ids()` waits for it. Ids and mask stand until the next step but one, the
    logits until the next."""

    def __init__(
        self, report_N: Tensor, logits_RV: Tensor, *, num_ranks: int, num_rows: int
    ) -> None:
        self._report_N = report_N
        self._num_ranks = num_ranks
        self._num_rows = num_rows
        self.logits_RV = logits_RV[:num_rows]
        self._done: torch.cuda.Event | None = None
        if logits_RV.device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def is_done(self) -> bool:
        return self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]

    def ids(self) -> NDArray[np.int32]:
        """A token for each wanted row; -1 where its logits have no finite maximum."""
        return self._read(self._num_ranks, self._num_ranks + self._num_rows)

    def mask(self) -> NDArray[np.int32] | None:
        """The exchange's mask as the step's last kernel has left it; None without an exchange.
        Waits for the step."""
        return self._read(0, self._num_ranks) if self._num_ranks else None

    def _read(self, start: int, end: int) -> NDArray[np.int32]:
        if self._done is not None:
            self._done.synchronize()
        values: NDArray[np.int32] = self._report_N[start:end].numpy().copy()
        return values


class Decoder:
    """Engine thread only. `moe` is the way through the experts; `slot_of_LE` names, for each MoE
    layer and expert, the physical slot that this rank's tokens go to. `mask_R`, int32 on the
    device, is the exchange's mask of ranks: a step brings it to the host with the sampled ids."""

    def __init__(
        self,
        sizes: DecoderSizes,
        weights: DecoderWeights,
        moe: MoeStage,
        options: DecoderOptions,
        *,
        mask_R: Tensor | None = None,
    ) -> None:
        shape = sizes.attention
        if not isinstance(shape, GqaShape) or sizes.num_moe_layers < sizes.num_layers:
            raise ValueError("latent attention and dense layers are not built for CUDA ranks")
        self.sizes = sizes
        self.options = options
        self._weights = weights
        self._moe = moe
        self._mask_R = mask_R
        device, dtype = weights.device, weights.dtype
        self.slot_of_LE = slot_table(sizes.num_moe_layers, sizes.num_experts, device)
        cache = (sizes.num_layers, options.kv_blocks, shape.kv_heads, options.block_tokens)
        self._k_LBJUD = torch.zeros((*cache, shape.head_dim), device=device, dtype=dtype)
        self._v_LBJUD = torch.zeros_like(self._k_LBJUD)
        rotations = sizes.rope.rotations(shape.head_dim, options.context_tokens_max)
        self._cos_CD, self._sin_CD = (torch.from_numpy(table).to(device) for table in rotations)
        prefill = StepSize(
            tokens=options.prefill_tokens,
            sequences=options.prefill_sequences,
            rows=options.prefill_sequences,
            decode=False,
        )
        ladder = [
            StepSize(tokens=n, sequences=n, rows=n, decode=True) for n in options.decode_ladder
        ]
        self._buffers = StepBuffers(
            sizes,
            tokens_max=max(s.tokens for s in (prefill, *ladder)),
            rows_max=max(s.rows for s in (prefill, *ladder)),
            splits_max=-(-options.context_tokens_max // attention.SPLIT_TOKENS),
            num_ranks=0 if mask_R is None else mask_R.shape[0],
            invariant=options.invariant,
            device=device,
            dtype=dtype,
        )
        width = -(-options.context_tokens_max // options.block_tokens)
        self._prefill = StepInputs(prefill, width, device)
        self._decode = [StepInputs(size, width, device) for size in ladder]
        self._graphs: dict[StepSize, torch.cuda.CUDAGraph] = {}
        self._turn = 0

    def use_slots(self, slot_of_LE: NDArray[np.int32]) -> None:
        """From the next step on; nothing may be in flight. Graphs stay."""
        self.slot_of_LE.copy_(torch.from_numpy(slot_of_LE))

    def capture(self) -> None:
        """A graph for every rung of the ladder and for the prefill chunk. Compiles what is not
        compiled yet. Writes nothing to the KV cache."""
        pool = None
        for inputs in (self._prefill, *self._decode):
            self._enqueue(inputs)  # compiles; the inputs name no token
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._enqueue(inputs)
            pool = pool or graph.pool()
            self._graphs[inputs.size] = graph

    def launch(self, batch: StepBatch, draws: Sequence[RowDraw] = ()) -> PendingStep:
        """Enqueues one step; `draws` one per wanted row, none: greedy. At most one earlier step may
        still have its ids unread. A token id of -1 - r stands for what the former step samples in
        its row r, so that the host can enqueue a step before it knows the former one's tokens."""
        inputs = self._inputs_for(batch)
        inputs.fill(batch, draws)
        inputs.upload()
        graph = self._graphs.get(inputs.size)
        if graph is None:
            self._enqueue(inputs)
        else:
            graph.replay()
        rows, buffers = inputs.size.rows, self._buffers
        self._turn ^= 1
        report_N, num_ranks = buffers.host_reports_2N[self._turn], buffers.mask_R.shape[0]
        end = num_ranks + rows
        report_N[:end].copy_(buffers.report_N[:end], non_blocking=True)
        return PendingStep(
            report_N,
            buffers.logits_PRV[:, :rows].view(rows, -1),
            num_ranks=num_ranks,
            num_rows=batch.logits_rows_R.shape[0],
        )

    def slots_of_last_step(self) -> Tensor:
        """`[L, T, K]` physical slots, for counting; rows beyond the last step's are old."""
        return self._buffers.slots_LTK

    def _inputs_for(self, batch: StepBatch) -> StepInputs:
        tokens = batch.num_tokens
        is_decode = tokens == batch.logits_rows_R.shape[0] == batch.block_tables_SB.shape[0]
        if is_decode:
            for inputs in self._decode:
                if tokens <= inputs.size.tokens:
                    return inputs
        return self._prefill

    def _enqueue(self, inputs: StepInputs) -> None:
        buffers, weights = self._buffers, self._weights
        tokens, eps = inputs.size.tokens, self.sizes.norm_eps
        x, x_mid, h = (b[:tokens] for b in (buffers.x_TH, buffers.x_mid_TH, buffers.h_TH))
        first_norm = weights.layers[0].input_norm_H
        residual.embed_norm(
            inputs.ids_T,
            buffers.ids_R,
            weights.embedding_VH,
            first_norm,
            x,
            h,
            eps=eps,
        )
        norms = [w.input_norm_H for w in weights.layers[1:]] + [weights.final_norm_H]
        for layer, next_norm in enumerate(norms):
            self._attend(layer, inputs, x, x_mid, h)
            routed = Routed(
                h_TH=h,
                slots_TK=buffers.slots_LTK[layer, :tokens],
                weights_TK=buffers.weights_TK[:tokens],
            )
            routing.choose_slots(
                buffers.scores_TE[:tokens],
                self.slot_of_LE[layer],
                inputs.paging.position_T,
                routed.slots_TK,
                routed.weights_TK,
                normalise=self.sizes.routing.normalise,
            )
            onward = Onward(x_TH=x_mid, norm_H=next_norm, x_out_TH=x, h_TH=h, eps=eps)
            self._moe.run(layer, routed, onward)
        self._sample(inputs, h)
        if self._mask_R is not None:
            buffers.mask_R.copy_(self._mask_R)

    def _attend(self, layer: int, inputs: StepInputs, x: Tensor, x_mid: Tensor, h: Tensor) -> None:
        """From the normed stream to the stream after attention, normed, and the router's scores."""
        buffers, eps = self._buffers, self.sizes.norm_eps
        weights, tokens = self._weights.layers[layer], x.shape[0]
        own, mlp = weights.attention, weights.mlp
        assert isinstance(own, GqaWeights), "as the sizes say"
        assert isinstance(mlp, MoeWeights), "as the sizes say"
        k_BJUD, v_BJUD = self._k_LBJUD[layer], self._v_LBJUD[layer]
        qkv = buffers.qkv_parts(tokens)
        self._multiply(h, own.w_qkv_CH, qkv)
        attention.rotate_and_store(
            qkv,
            own.q_norm_D,
            own.k_norm_D,
            self._cos_CD,
            self._sin_CD,
            inputs.paging,
            buffers.q_TQD[:tokens],
            k_BJUD,
            v_BJUD,
            eps=eps,
        )
        heads = buffers.heads_TO[:tokens]
        attention.attend(
            buffers.q_TQD[:tokens], k_BJUD, v_BJUD, inputs.paging, buffers.partials, heads
        )
        out = buffers.attention_parts(tokens)
        self._multiply(heads, weights.w_o_HO, out)
        router = (mlp.w_router_EH, buffers.scores_TE[:tokens])
        residual.add_norm(x, out, weights.mlp_norm_H, x_mid, h, eps=eps, router=router)

    def _sample(self, inputs: StepInputs, h: Tensor) -> None:
        buffers, rows = self._buffers, inputs.size.rows
        if not inputs.size.decode:
            h = h.index_select(0, inputs.logits_rows_R)
        logits_1RV = buffers.logits_PRV[:, :rows]
        self._multiply(h, self._weights.w_head_VH, logits_1RV)
        ids_R = buffers.ids_R[:rows]
        sampling.sample_rows(logits_1RV[0], inputs.draws, ids_R)

    def _multiply(self, x_TI: Tensor, w_OI: Tensor, out_PTO: Tensor) -> None:
        if self.options.invariant:
            linear_parts(x_TI, w_OI, out_PTO)
        else:
            torch.mm(x_TI, w_OI.T, out=out_PTO[0])
