"""Compares tiles of the kernels of MXFP4 experts, over all layers of a model, so that no weight is
in the card's cache. Part of `benchmarks.gpu_formats`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_kernels import random_slots
from benchmarks.gpu_scaled_kernels import rates_by_tile, rows_in_tiles
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.kernels import mxfp4_experts
from gpu_worker.cuda.kernels.activation import Epilogue
from gpu_worker.cuda.kernels.mxfp4_experts import Mxfp4Tile
from gpu_worker.cuda.kernels.tall_experts import TALL_ROWS
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.mxfp4_matrix import Mxfp4Matrix

HEIGHTS = ((1, 0), (32, 16), (128, 16), (128, 32), (4096, TALL_ROWS))
"""(tokens, rows of a tile)."""
_SHORT_TILES = (
    Mxfp4Tile(64, 128, 4, 2),
    Mxfp4Tile(64, 128, 4, 3),
    Mxfp4Tile(64, 128, 4, 4),
    Mxfp4Tile(64, 256, 4, 2),
    Mxfp4Tile(64, 256, 4, 3),
    Mxfp4Tile(128, 128, 4, 2),
    Mxfp4Tile(128, 128, 4, 3),
)
_TALL_TILES = (
    Mxfp4Tile(64, 128, 4, 2),
    Mxfp4Tile(64, 128, 4, 3),
    Mxfp4Tile(128, 128, 4, 2),
    Mxfp4Tile(128, 128, 8, 2),
    Mxfp4Tile(128, 128, 8, 3),
)


class Mxfp4Sweep:
    """Rates: bytes of the distinct experts that are read, in TB/s, and TFLOP/s."""

    def __init__(self, sizes: DecoderSizes, slots: CudaSlots) -> None:
        self._sizes, self._slots = sizes, slots

    def tiles(self, tokens: int, height: int) -> dict[str, Any]:
        sizes, slots = self._sizes, self._slots
        slots_LTK = random_slots(tokens, sizes, slots.device)[: sizes.num_moe_layers]
        rows = [rows_in_tiles(s.contiguous(), slots.slots_per_rank, height) for s in slots_LTK]
        distinct = sum(len(s.unique()) for s in slots_LTK)
        pairs = tokens * sizes.top_k
        x = torch.randn(tokens, sizes.hidden_size, device=slots.device).bfloat16()
        inner = x.new_zeros(pairs, sizes.inner_size)
        y = x.new_zeros(pairs, sizes.hidden_size)

        def up(tile: Mxfp4Tile) -> None:
            for layer, row in enumerate(rows):
                w_gate_up = _in_mxfp4(slots.gate_up(layer))
                mxfp4_experts.gate_up(x, w_gate_up, row, inner, self._epilogue(layer), tile=tile)

        def down(tile: Mxfp4Tile) -> None:
            for layer, row in enumerate(rows):
                w_down = _in_mxfp4(slots.down(layer))
                mxfp4_experts.down(inner, w_down, row, y, self._epilogue(layer), tile=tile)

        nbytes = distinct * slots.form.num_bytes
        work = 2 * pairs * sizes.num_expert_weights * len(rows)
        tiles = _TALL_TILES if height >= TALL_ROWS else _SHORT_TILES
        return {
            "gate_up": rates_by_tile(up, tiles, 2 * nbytes / 3, 2 * work / 3),
            "down": rates_by_tile(down, tiles, nbytes / 3, work / 3),
        }

    def _epilogue(self, layer: int) -> Epilogue:
        b_gate_up, b_down = self._slots.b_gate_up_LSJ, self._slots.b_down_LSH
        assert b_gate_up is not None, "gpt-oss's experts have biases"
        assert b_down is not None, "gpt-oss's experts have biases"
        return Epilogue(clamped=True, b_gate_up_SJ=b_gate_up[layer], b_down_SH=b_down[layer])


def _in_mxfp4(weights: object) -> Mxfp4Matrix:
    assert isinstance(weights, Mxfp4Matrix), "the slots are in another format"
    return weights
