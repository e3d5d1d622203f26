"""Matrices that stay in block-scaled FP8 on the device, as checkpoints store them. Imports no
kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Rows and columns of a block: what the kernels take."""
CODES = torch.float8_e4m3fn
CODES_STD = 64.0
"""The deviation of random codes, of which the largest is 448."""
_CAPABILITY_MIN = (8, 9)


@dataclass(frozen=True, slots=True)
class ScaledBlocks:
    """A value is that of its code times the scale of its block.

    `codes` are E4M3, `[..., N, K]`. `scales` are float32, `[..., P, ceil(K / BLOCK)]`. The rows may
    be those of several matrices one after the other (gate, then up): each has scales for all of its
    own blocks, of which the last in a row or column may be partial.
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


Matrix = Tensor | ScaledBlocks


def in_one_slot(weights: Matrix) -> Matrix:
    """With a leading axis of one."""
    if isinstance(weights, Tensor):
        return weights[None]
    return ScaledBlocks(weights.codes[None], weights.scales[None])


def plain(weights: Matrix) -> Tensor:
    """For readers that know only plain ones."""
    assert isinstance(weights, Tensor), "the weights are in FP8"
    return weights


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the kernels take such matrices there: a card must convert E4M3 by itself."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _CAPABILITY_MIN


def fill_codes(codes: Tensor) -> None:
    """With random ones, for measurements and tests."""
    drawn = torch.empty(codes.shape, device=codes.device, dtype=torch.bfloat16)
    largest = torch.finfo(CODES).max
    codes.copy_(drawn.normal_(std=CODES_STD).clamp_(-largest, largest))


def num_blocks(size: int) -> int:
    return -(-size // BLOCK)
