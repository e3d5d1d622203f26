"""Matrices that stay in block-scaled FP8 on the device, as checkpoints store them. Imports no
kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Rows and columns of a block: what the kernels take."""
_CAPABILITY_MIN = (8, 9)
CODES = torch.float8_e4m3fn


class ScaledBlocks(NamedTuple):
    """A value is that of its code times the scale of its block.

    `codes` are E4M3, `[..., N, K]`. `scales` are float32, `[..., P, ceil(K / BLOCK)]`. The rows may
    be those of several matrices of the same size, one after the other (gate, then up): each has
    scales for all of its own blocks, of which the last in a row or column may be partial.
    """

    codes: Tensor
    scales: Tensor

    def __getitem__(self, index: int) -> ScaledBlocks:  # type: ignore[override]
        """One index of the leading axis."""
        return ScaledBlocks(self.codes[index], self.scales[index])


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the kernels take such matrices there: a card must convert E4M3 by itself."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _CAPABILITY_MIN


def num_blocks(size: int) -> int:
    return -(-size // BLOCK)
