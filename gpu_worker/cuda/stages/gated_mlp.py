"""An MLP that every token of a step goes through: that of a dense layer, or a layer's shared
experts."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.cuda.kernels import experts
from gpu_worker.cuda.kernels.routing import SlotTiles
from gpu_worker.cuda.kernels.tall_experts import TALL_ROWS
from gpu_worker.cuda.stages.gemm import Gemm, StepAllocator
from gpu_worker.cuda.weights.decoder_weights import MlpWeights
from gpu_worker.cuda.weights.scaled_blocks import in_one_slot


class GatedMlp:
    """Serves every layer of the same inner size."""

    def __init__(self, allocator: StepAllocator, *, hidden_size: int, inner_size: int) -> None:
        self._inner_TI = allocator.zeros(allocator.tokens_max, inner_size)
        self._down = Gemm(allocator, inner=inner_size, columns=hidden_size)
        self._no_slots_11 = allocator.zeros(1, 1, of=torch.int32)
        self._rows: dict[int, experts.Rows] = {}

    def run(self, weights: MlpWeights, h_TH: Tensor) -> Tensor:
        """`[P, T, H]`: parts that the next kernel adds. Valid until the next call."""
        tokens = h_TH.shape[0]
        if tokens not in self._rows:
            self._rows[tokens] = self._rows_for(tokens)
        rows, inner_TI = self._rows[tokens], self._inner_TI[:tokens]
        size = _tile_rows(tokens)
        tile = None if size == TALL_ROWS else experts.dense_mlp_tile(size, inner_TI.shape[1])
        experts.gate_up(h_TH, in_one_slot(weights.w_gate_up_JH), rows, inner_TI, tile=tile)
        return self._down.run(inner_TI, weights.w_down_HI)

    def _rows_for(self, tokens: int) -> experts.Rows:
        """All tokens in slot 0, in their order."""
        device, size = self._inner_TI.device, _tile_rows(tokens)
        tiles = [[0, first, min(size, tokens - first)] for first in range(0, tokens, size)]
        return experts.Rows(
            self._no_slots_11,
            SlotTiles(
                order_N=self._no_slots_11,
                tiles_C3=torch.tensor(tiles, dtype=torch.int32, device=device),
                num_tiles_1=torch.tensor([len(tiles)], dtype=torch.int32, device=device),
                rows=size,
            ),
            padded=True,
        )


def _tile_rows(tokens: int) -> int:
    if tokens <= 16:
        return 16
    if tokens <= 32:
        return 32
    return 64 if tokens < 2 * TALL_ROWS else TALL_ROWS
