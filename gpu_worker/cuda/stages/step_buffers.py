"""The device memory that a step passes between its stages. It is allocated once for the largest
step, so that every graph holds the same addresses."""

from __future__ import annotations

import torch

from gpu_worker.cuda.stages.gemm import StepAllocator
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes


class StepBuffers:
    """Shape letters as in `kernels`. `report_N` (int32) is what the host reads of a step: the mask
    of ranks, then the sampled ids. `chosen_LE` counts how often each expert was chosen, modulo
    2³², except where the choice is fused into the experts' kernel."""

    def __init__(
        self, sizes: DecoderSizes, allocator: StepAllocator, *, rows_max: int, num_ranks: int
    ) -> None:
        tokens, hidden, single = allocator.tokens_max, sizes.hidden_size, torch.float32
        self.x_TH = allocator.zeros(tokens, hidden, of=single)
        self.x_mid_TH = allocator.zeros(tokens, hidden, of=single)
        self.h_TH = allocator.zeros(tokens, hidden)
        self.scores_TE = allocator.zeros(tokens, sizes.num_experts, of=single)
        self.choices_TE = allocator.zeros(tokens, sizes.num_experts, of=single)
        self.slots_LTK = allocator.zeros(sizes.num_moe_layers, tokens, sizes.top_k, of=torch.int64)
        self.chosen_LE = allocator.zeros(sizes.num_moe_layers, sizes.num_experts, of=torch.int32)
        self.weights_TK = allocator.zeros(tokens, sizes.top_k, of=single)
        self.report_N = allocator.zeros(num_ranks + rows_max, of=torch.int32)
        self.mask_R = self.report_N[:num_ranks]
        self.ids_R = self.report_N[num_ranks:]
        # There are two, so that a step may be enqueued before the report of the former is read.
        self.host_reports_2N = torch.zeros(
            2, num_ranks + rows_max, dtype=torch.int32, pin_memory=allocator.device.type == "cuda"
        )
