"""Random weights in MXFP4 as slots hold them, and what they stand for."""

from __future__ import annotations

import torch

from gpu_worker.cuda.weights.mxfp4_matrix import Mxfp4Matrix, scale_words
from tests.support.cuda_values import DEVICE

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
POSITIONS = [
    (4 * t + 2 * e + h, 8 * h + 2 * t + e, 16 + 8 * h + 2 * t + e)
    for t in range(4)
    for e in range(2)
    for h in range(2)
]
"""Of each byte of a group: its place, and what its low and its high half are the codes of."""


def random_mxfp4(slots: int, rows: int, columns: int) -> Mxfp4Matrix:
    """The scales of groups differ by up to 16 times, and sums have a deviation of about one."""
    codes = torch.randint(0, 256, (slots, rows, columns // 2), device=DEVICE, dtype=torch.uint8)
    middle = 127 - round(torch.tensor(float(9 * columns)).log2().item() / 2)
    shape = (slots, scale_words(columns), rows, 4)
    scales = torch.randint(middle - 2, middle + 3, shape, device=DEVICE, dtype=torch.uint8)
    return Mxfp4Matrix(codes, scales)


def widened(weights: Mxfp4Matrix) -> torch.Tensor:
    """`[S, N, K]` in float64."""
    slots, rows, columns = weights.shape
    values = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], device=DEVICE).double()
    bytes_SNGB = weights.codes.view(slots, rows, -1, 16).long()
    groups_SNGP = values.new_empty(slots, rows, columns // 32, 32)
    for place, low, high in POSITIONS:
        groups_SNGP[..., low] = values[bytes_SNGB[..., place] % 16]
        groups_SNGP[..., high] = values[bytes_SNGB[..., place] // 16]
    scales_SNG = weights.scales.transpose(1, 2).reshape(slots, rows, -1)[..., : columns // 32]
    exponents = scales_SNG.double() - 127
    return (groups_SNGP * torch.exp2(exponents)[..., None]).flatten(2)


def widened_gate_up(weights: Mxfp4Matrix) -> torch.Tensor:
    """As `widened`, with all rows of gate before those of up."""
    wide_SNK = widened(weights)
    slots, rows, columns = wide_SNK.shape
    turns = wide_SNK.view(slots, rows // 16, 2, 8, columns)
    return turns.transpose(1, 2).reshape(slots, rows, columns)
