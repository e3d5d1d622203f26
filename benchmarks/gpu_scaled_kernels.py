"""Compares tiles of the kernels of block-scaled FP8 experts, over all layers of a model, so that no
weight is in the card's cache. Part of `benchmarks.gpu_formats`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu_kernels import graph_ms, random_slots
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.kernels import pair_order, routing, scaled_experts, scaled_linear
from gpu_worker.cuda.kernels.experts import Rows
from gpu_worker.cuda.kernels.linear import PARTS_ROWS_MAX, num_parts
from gpu_worker.cuda.kernels.scaled_operands import ScaledTile
from gpu_worker.cuda.kernels.tall_experts import TALL_ROWS
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.scaled_blocks import Matrix, ScaledBlocks

SHORT_TILES = (
    ScaledTile(64, 4, 2),
    ScaledTile(64, 4, 3),
    ScaledTile(64, 4, 2, unroll=2),
    ScaledTile(64, 4, 3, unroll=2),
    ScaledTile(64, 4, 2, unroll=4),
    ScaledTile(128, 4, 2),
)
TALL_TILES = (
    ScaledTile(64, 4, 2),
    ScaledTile(64, 4, 3),
    ScaledTile(64, 4, 4),
    ScaledTile(64, 8, 2),
    ScaledTile(64, 8, 3),
    ScaledTile(128, 8, 3),
)
_UNGROUPED_TOKENS_MAX = 4
_Tile = TypeVar("_Tile", bound=tuple[Any, ...])


def rows_in_tiles(slots_TK: Tensor, num_slots: int, height: int) -> Rows:
    """Tiles of `height` rows; with 0 each pair is its own."""
    if not height:
        return Rows(slots_TK, None)
    tiles = routing.new_slot_tiles(slots_TK.numel(), num_slots, height, slots_TK.device)
    room = pair_order.new_block_counts(slots_TK.numel(), num_slots, slots_TK.device)
    pair_order.order_by_slot(slots_TK, num_slots, room, tiles)
    return Rows(slots_TK, tiles)


def rates_by_tile(
    run: Callable[[_Tile], None], tiles: Sequence[_Tile], nbytes: float, work: float
) -> dict[str, Any]:
    """Of work that reads so many bytes and takes so many operations."""
    rates: dict[str, Any] = {}
    for tile in tiles:
        try:
            milliseconds = graph_ms(partial(run, tile))
        except Exception as error:  # noqa: BLE001 — the other tiles are worth their device time
            rates["x".join(map(str, tile))] = repr(error)[:120]
            continue
        rates["x".join(map(str, tile))] = {
            "ms": round(milliseconds, 3),
            "tb_per_s": round(nbytes / milliseconds / 1e9, 3),
            "tflop_per_s": round(work / milliseconds / 1e9, 1),
        }
    return rates


class ScaledSweep:
    """Rates: bytes of the distinct weights that are read, in TB/s, and TFLOP/s."""

    def __init__(self, sizes: DecoderSizes, slots: CudaSlots) -> None:
        self._sizes, self._slots = sizes, slots
        self._device = slots.device

    def tiles(self, tokens: int) -> dict[str, Any]:
        sizes = self._sizes
        slots_LTK = random_slots(tokens, sizes, self._device)[: sizes.num_moe_layers]
        rows = [self._rows(slots_TK.contiguous()) for slots_TK in slots_LTK]
        distinct = sum(len(s.unique()) for s in slots_LTK)
        pairs = tokens * sizes.top_k
        x = torch.randn(tokens, sizes.hidden_size, device=self._device).bfloat16()
        inner = x.new_zeros(pairs, sizes.inner_size)
        y = x.new_zeros(pairs, sizes.hidden_size)

        def up(tile: ScaledTile) -> None:
            for layer, row in enumerate(rows):
                scaled_experts.gate_up(x, self._weights(layer)[0], row, inner, tile=tile)

        def down(tile: ScaledTile) -> None:
            for layer, row in enumerate(rows):
                scaled_experts.down(inner, self._weights(layer)[1], row, y, tile=tile)

        nbytes = distinct * sizes.num_expert_weights
        work = 2 * pairs * sizes.num_expert_weights * len(rows)
        tall = rows[0].tiles is not None and rows[0].tiles.rows >= TALL_ROWS
        tiles = TALL_TILES if tall else SHORT_TILES
        return {
            "gate_up": rates_by_tile(up, tiles, 2 * nbytes / 3, 2 * work / 3),
            "down": rates_by_tile(down, tiles, nbytes / 3, work / 3),
        }

    def linear(self, tokens: int, matrices: Sequence[Matrix]) -> dict[str, Any]:
        """Of one matrix of every layer, in FP8."""
        rows, inner = matrices[0].shape
        x = torch.randn(tokens, inner, device=self._device).bfloat16()
        parts = num_parts(inner)
        few = torch.zeros(parts, tokens, rows, device=self._device)

        def run(tile: ScaledTile) -> None:
            for w_NK in matrices:
                assert isinstance(w_NK, ScaledBlocks), "the weights are not in FP8"
                if tokens > PARTS_ROWS_MAX:
                    scaled_linear.linear_whole(x, w_NK, few[0], parts=parts, tile=tile)
                else:
                    scaled_linear.linear_parts(x, w_NK, few, tile=tile)

        tiles = TALL_TILES if tokens > PARTS_ROWS_MAX else SHORT_TILES
        values = len(matrices) * rows * inner
        return rates_by_tile(run, tiles, values, 2 * tokens * values)

    def _weights(self, layer: int) -> tuple[ScaledBlocks, ScaledBlocks]:
        gate_up, down = self._slots.gate_up(layer), self._slots.down(layer)
        assert isinstance(gate_up, ScaledBlocks), "the slots hold no FP8"
        assert isinstance(down, ScaledBlocks), "the slots hold no FP8"
        return gate_up, down

    def _rows(self, slots_TK: Tensor) -> Rows:
        tokens = slots_TK.shape[0]
        height = 0 if tokens <= _UNGROUPED_TOKENS_MAX else 16 if tokens <= 256 else TALL_ROWS
        return rows_in_tiles(slots_TK, self._slots.slots_per_rank, height)
