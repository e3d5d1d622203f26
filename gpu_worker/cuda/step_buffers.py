"""The device memory that a step passes from kernel to kernel: made once for the largest step, so
that every graph holds the same addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.cuda.decoder_sizes import DecoderSizes
from gpu_worker.cuda.kernels.attention import Partials
from gpu_worker.cuda.kernels.linear import num_parts
from gpu_worker.model.gqa_shape import GqaShape


class StepBuffers:
    """Shapes as in `kernels`; O = Q·D. The dense products lie in P parts in float32 where they must
    be batch-invariant, else whole in the model's type. `report_N` is what the host reads of a step:
    the mask of ranks, then the sampled ids."""

    def __init__(
        self,
        sizes: DecoderSizes,
        *,
        tokens_max: int,
        rows_max: int,
        splits_max: int,
        num_ranks: int,
        invariant: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, device=device, dtype=of)

        single = torch.float32
        shape = sizes.attention
        assert isinstance(shape, GqaShape), "other attention has no kernels"
        self._sizes = sizes
        self._qkv_size = shape.q_size + 2 * shape.kv_size
        self._hidden_parts = num_parts(sizes.hidden_size) if invariant else 1
        self._heads_parts = num_parts(sizes.heads_size) if invariant else 1
        product = single if invariant else dtype
        self.x_TH = empty(tokens_max, sizes.hidden_size, of=single)
        self.x_mid_TH = empty(tokens_max, sizes.hidden_size, of=single)
        self.h_TH = empty(tokens_max, sizes.hidden_size)
        self._qkv = empty(self._hidden_parts * tokens_max * self._qkv_size, of=product)
        self._attention = empty(self._heads_parts * tokens_max * sizes.hidden_size, of=product)
        self.q_TQD = empty(tokens_max, shape.num_heads, shape.head_dim)
        self.heads_TO = empty(tokens_max, sizes.heads_size)
        splits = (tokens_max, shape.num_heads, splits_max)
        self.partials = Partials(
            empty(*splits, shape.head_dim, of=single),
            empty(*splits, of=single),
            empty(*splits, of=single),
        )
        self.scores_TE = empty(tokens_max, sizes.num_experts, of=single)
        self.slots_LTK = empty(sizes.num_moe_layers, tokens_max, sizes.top_k, of=torch.int64)
        self.weights_TK = empty(tokens_max, sizes.top_k, of=single)
        self.logits_PRV = empty(1, rows_max, sizes.vocab_size, of=product)
        self.report_N = empty(num_ranks + rows_max, of=torch.int32)
        self.mask_R = self.report_N[:num_ranks]
        self.ids_R = self.report_N[num_ranks:]
        pinned = device.type == "cuda"
        # Two, so that a step may be enqueued before the former one's report has been read.
        self.host_reports_2N = torch.zeros(
            2, num_ranks + rows_max, dtype=torch.int32, pin_memory=pinned
        )

    def qkv_parts(self, tokens: int) -> Tensor:
        return _parts(self._qkv, self._hidden_parts, tokens, self._qkv_size)

    def attention_parts(self, tokens: int) -> Tensor:
        return _parts(self._attention, self._heads_parts, tokens, self._sizes.hidden_size)


def _parts(buffer: Tensor, num_parts: int, tokens: int, columns: int) -> Tensor:
    """The start of the buffer, as whole parts `[P, T, columns]`."""
    return buffer[: num_parts * tokens * columns].view(num_parts, tokens, columns)
