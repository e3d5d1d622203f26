"""A MoE decoder on one CUDA rank. Decode runs under CUDA graphs for several batch sizes, prefill
runs in chunks through the same kernels, and the device samples the tokens.

Graphs hold addresses, never values: expert map, slots, block tables and batch change in place, so a
death, a heal or a rejoin needs no new capture. A step makes one copy to the device and one back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.cuda.kernels import residual, sampling
from gpu_worker.cuda.kernels.chunk_attention import chunk_tile_tokens
from gpu_worker.cuda.sampling_inputs import RowDraw
from gpu_worker.cuda.stages.attention_stage import AttentionStage
from gpu_worker.cuda.stages.feed_forward import FeedForward
from gpu_worker.cuda.stages.gemm import Gemm, StepAllocator
from gpu_worker.cuda.stages.gqa_stage import GqaStage
from gpu_worker.cuda.stages.mla_stage import MlaStage
from gpu_worker.cuda.stages.moe_stage import MoeStage, ResidualNorm, slot_table
from gpu_worker.cuda.stages.step_buffers import StepBuffers
from gpu_worker.cuda.step_inputs import StepInputs, StepSize
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights, GqaWeights, MlaWeights
from gpu_worker.engine.step_batch import StepBatch

DECODE_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_PREFILL_TOKENS_MIN = 128
"""No smaller graphs are captured for steps with prefill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderOptions:
    """Sizes of the KV cache and of steps. A step with prefill has up to `prefill_tokens` tokens of
    up to `prefill_sequences` sequences and as many wanted rows. With `invariant`, dense GEMMs are
    computed in fixed parts, so that the bits of a row do not depend on its batch; without it, torch
    computes them. `replica_turns` is the number of turns in the table of slots. `kv_dtype` is that
    of cached keys and values, or latents; None: the weights'."""

    kv_blocks: int
    block_tokens: int = 16
    context_tokens_max: int = 4096
    decode_batch_sizes: tuple[int, ...] = DECODE_BATCH_SIZES
    prefill_tokens: int = 512
    prefill_sequences: int = 64
    invariant: bool = True
    replica_turns: int = 1
    kv_dtype: torch.dtype | None = None

    @property
    def positions_max(self) -> int:
        """Positions of a sequence, which is never longer than the cache."""
        return min(self.context_tokens_max, self.kv_blocks * self.block_tokens)

    def decode_sizes(self) -> list[StepSize]:
        """In rising order."""
        batches = self.decode_batch_sizes
        return [StepSize(tokens=n, sequences=n, rows=n, decode=True) for n in batches]

    def prefill_sizes(self, tile_tokens: int) -> list[StepSize]:
        """In rising order, each twice the one before, so that a short prompt does not pay for the
        longest chunk."""
        tokens = [self.prefill_tokens]
        while tokens[0] >= 2 * _PREFILL_TOKENS_MIN:
            tokens.insert(0, -(-tokens[0] // 2))
        return [
            StepSize(
                tokens=n,
                sequences=min(n, self.prefill_sequences),
                rows=min(n, self.prefill_sequences),
                decode=False,
                tile_tokens=tile_tokens,
            )
            for n in tokens
        ]


class PendingStep:
    """A step in flight; `ids()` waits for it. Read ids and mask before the step after the next is
    launched, and logits before the next step is."""

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
        """A token per wanted row, int32; -1 if its logits have no finite maximum. Waits for the
        step."""
        return self._read(self._num_ranks, self._num_ranks + self._num_rows)

    def mask(self) -> NDArray[np.int32] | None:
        """The exchange's mask after the step's last kernel, int32 `[R]`; None without an exchange.
        Waits for the step."""
        return self._read(0, self._num_ranks) if self._num_ranks else None

    def _read(self, start: int, end: int) -> NDArray[np.int32]:
        if self._done is not None:
            self._done.synchronize()
        values: NDArray[np.int32] = self._report_N[start:end].numpy().copy()
        return values


class Decoder:
    """For the engine thread only. `moe` computes the experts. `slot_of_LUE` holds, per MoE
    layer, turn and expert, the physical slot that this rank's tokens go to. `mask_R`, int32 on the
    device, is the exchange's mask of ranks: each step copies it to the host with the sampled ids.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        weights: DecoderWeights,
        moe: MoeStage,
        options: DecoderOptions,
        *,
        mask_R: Tensor | None = None,
    ) -> None:
        """Raises ValueError for sizes that have no kernels."""
        self.sizes = sizes
        self.options = options
        self._weights = weights
        self._mask_R = mask_R
        device = weights.device
        self.slot_of_LUE = slot_table(
            sizes.num_slot_layers, options.replica_turns, sizes.num_experts, device
        )
        decode_sizes = options.decode_sizes()
        prefill_sizes = options.prefill_sizes(_tile_tokens(sizes))
        step_sizes = (*decode_sizes, *prefill_sizes)
        rows_max = max(s.rows for s in step_sizes)
        allocator = StepAllocator(
            tokens_max=max(s.tokens for s in step_sizes),
            invariant=options.invariant,
            device=device,
            dtype=weights.dtype,
        )
        num_ranks = 0 if mask_R is None else mask_R.shape[0]
        self._buffers = StepBuffers(sizes, allocator, rows_max=rows_max, num_ranks=num_ranks)
        self.attention = _attention_stage(sizes, weights, options, allocator)
        self._feed_forward = FeedForward(sizes, self._buffers, self.slot_of_LUE, moe, allocator)
        hidden = sizes.hidden_size
        self._output = Gemm(allocator, inner=sizes.heads_size, columns=hidden)
        self._logits = Gemm(
            allocator, inner=hidden, columns=sizes.vocab_size, rows_max=rows_max, in_parts=False
        )
        width = -(-options.positions_max // options.block_tokens)
        self._decode = [StepInputs(size, width, device) for size in decode_sizes]
        self._prefill = [StepInputs(size, width, device) for size in prefill_sizes]
        self._graphs: dict[StepSize, torch.cuda.CUDAGraph] = {}
        self._buffer_index = 0

    @property
    def expert_counts(self) -> Tensor:
        """`[L, E]`: how often each expert was chosen, int32 on the device, modulo 2³²."""
        return self._buffers.chosen_LE

    def use_slots(self, slot_of_LUE: NDArray[np.int32]) -> None:
        """Takes effect from the next step on. No step may be in flight. Graphs stay valid."""
        self.slot_of_LUE.copy_(torch.from_numpy(slot_of_LUE))

    def capture(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Captures a graph for every size of step. Compiles kernels that are not compiled yet.
        Writes nothing to the KV cache. `on_progress` hears before each graph how many are done, of
        how many."""
        pool = None
        every = (*reversed(self._prefill), *self._decode)
        for done, inputs in enumerate(every):
            on_progress(done, len(every))
            self._enqueue(inputs)  # compiles; the inputs hold no token
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Of this thread alone: another one pins memory meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._enqueue(inputs)
            pool = pool or graph.pool()
            self._graphs[inputs.size] = graph

    def launch(self, batch: StepBatch, draws: Sequence[RowDraw] = ()) -> PendingStep:
        """Enqueues one step. `draws` has one entry per wanted row, or none for greedy sampling.

        At most one earlier step may still have its ids unread. A token id of -1 - r stands for what
        the former step samples in its row r, so that the host can enqueue a step before it knows
        the former step's tokens.
        """
        inputs = self._inputs_for(batch)
        inputs.fill(batch, draws)
        inputs.upload()
        graph = self._graphs.get(inputs.size)
        if graph is None:
            self._enqueue(inputs)
        else:
            graph.replay()
        rows, buffers = inputs.size.rows, self._buffers
        self._buffer_index ^= 1
        report_N, num_ranks = buffers.host_reports_2N[self._buffer_index], buffers.mask_R.shape[0]
        end = num_ranks + rows
        report_N[:end].copy_(buffers.report_N[:end], non_blocking=True)
        return PendingStep(
            report_N,
            self._logits.result_view(rows)[0],
            num_ranks=num_ranks,
            num_rows=batch.logits_rows_R.shape[0],
        )

    def slots_of_last_step(self) -> Tensor:
        """`[L, T, K]` physical slots, for counting. Rows after those of the last step are stale."""
        return self._buffers.slots_LTK

    def _inputs_for(self, batch: StepBatch) -> StepInputs:
        tokens = batch.num_tokens
        has_one_each = tokens == batch.block_tables_SB.shape[0]
        if has_one_each and np.array_equal(batch.logits_rows_R, np.arange(tokens)):
            for inputs in self._decode:
                if tokens <= inputs.size.tokens:
                    return inputs
        return next(
            (inputs for inputs in self._prefill if tokens <= inputs.size.tokens), self._prefill[-1]
        )

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
            own = weights.layers[layer]
            heads = self.attention.run(layer, h, inputs.paging)
            out = self._output.run(heads, own.w_o_HO)
            router = self._feed_forward.router(own.mlp, tokens)
            residual.add_norm(
                x, out, own.mlp_norm_H, x_mid, h, eps=eps, bias_H=own.output_bias, router=router
            )
            residual_norm = ResidualNorm(x_TH=x_mid, norm_H=next_norm, x_out_TH=x, h_TH=h, eps=eps)
            self._feed_forward.run(layer, own.mlp, inputs.paging.position_T, residual_norm)
        self._sample(inputs, h)
        if self._mask_R is not None:
            buffers.mask_R.copy_(self._mask_R)

    def _sample(self, inputs: StepInputs, h: Tensor) -> None:
        rows = inputs.size.rows
        if not inputs.size.decode:
            h = h.index_select(0, inputs.logits_rows_R)
        logits_1RV = self._logits.run(h, self._weights.w_head_VH)
        sampling.sample_rows(logits_1RV[0], inputs.draws, self._buffers.ids_R[:rows])


def _tile_tokens(sizes: DecoderSizes) -> int:
    """Tokens of an attention tile. Latent attention has no tiles of several tokens."""
    shape = sizes.attention
    return (
        1 if isinstance(shape, MlaShape) else chunk_tile_tokens(shape.num_heads, shape.num_kv_heads)
    )


def _attention_stage(
    sizes: DecoderSizes, weights: DecoderWeights, options: DecoderOptions, allocator: StepAllocator
) -> AttentionStage:
    shape, layers = sizes.attention, [layer.attention for layer in weights.layers]
    if isinstance(shape, MlaShape):
        return MlaStage(
            shape,
            [own for own in layers if isinstance(own, MlaWeights)],
            sizes.rope,
            allocator,
            kv_blocks=options.kv_blocks,
            block_tokens=options.block_tokens,
            context_tokens_max=options.positions_max,
            kv_dtype=options.kv_dtype,
        )
    return GqaStage(
        shape,
        [own for own in layers if isinstance(own, GqaWeights)],
        sizes.rope,
        allocator,
        kv_blocks=options.kv_blocks,
        block_tokens=options.block_tokens,
        context_tokens_max=options.positions_max,
        decode_rows_max=max(options.decode_batch_sizes, default=0),
        norm_eps=sizes.norm_eps,
        windows=[sizes.window_of(layer) for layer in range(sizes.num_layers)],
        kv_dtype=options.kv_dtype,
    )
