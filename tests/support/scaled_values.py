"""Random weights in block-scaled FP8, and what they stand for."""

from __future__ import annotations

import torch

from gpu_worker.cuda.weights.scaled_blocks import BLOCK, CODES, ScaledBlocks, num_blocks
from tests.support.cuda_values import DEVICE


def random_blocks(slots: int, rows: int, columns: int, *, matrices: int = 1) -> ScaledBlocks:
    """Of so many matrices one after the other, `[S, matrices · rows, columns]`. The scales of
    blocks differ by up to 8 times."""
    codes = torch.randn(slots, matrices * rows, columns, device=DEVICE) * 60
    grid = (slots, matrices * num_blocks(rows), num_blocks(columns))
    scales = (2.0 ** (3 * torch.rand(grid, device=DEVICE))) / 60 / columns**0.5
    return ScaledBlocks(codes.clamp(-448, 448).to(CODES), scales)


def dequantised(weights: ScaledBlocks, *, matrices: int = 1) -> torch.Tensor:
    """In float64."""
    slots, rows, columns = weights.codes.shape
    grid = weights.scales.view(slots, matrices, -1, weights.scales.shape[-1]).double()
    spread = grid.repeat_interleave(BLOCK, dim=2).repeat_interleave(BLOCK, dim=3)
    spread = spread[:, :, : rows // matrices, :columns]
    return weights.codes.double() * spread.reshape(slots, rows, columns)
