"""Matrices that stay in MXFP4 on the device, as gpt-oss's checkpoints store them, with their codes
in an order that the kernels widen quickly. Imports no kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.checkpoint.quantisation import MXFP4_GROUP, MXFP4_GROUP_BYTES, Codes
from gpu_worker.cuda.weights.scaled_blocks import Matrix

TOGETHER = 4
"""Groups whose scales lie side by side, as one word."""
TURN_ROWS = 8
"""Rows of gate, then as many of up, so that one thread of a product gets the sums of both."""

_CODES_RMS = math.sqrt(137 / 16)  # of random codes
_SCALE_BIAS = 127
_GROUPS_MAX = 2**13
"""How many are put in order at once, so that all passes over them find them in the cache."""
_Words = NDArray[np.uint64]
_LOW_HALVES, _HIGH_HALVES = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0)
_EVEN_QUARTERS, _ODD_QUARTERS = np.uint64(0x0000FFFF0000FFFF), np.uint64(0xFFFF0000FFFF0000)


@dataclass(frozen=True, slots=True)
class Mxfp4Matrix:
    """A value is that of its E2M1 code times 2 to the power of its group's scale less 127.

    `codes` are uint8 `[..., N, K / 2]`, 16 bytes for a group of 32 positions. Byte 4t + 2e + h of a
    group has the code of position 8h + 2t + e in its low half and that of position 16 + 8h + 2t + e
    in its high half: four bytes are what one thread of a product multiplies. `scales` are uint8
    `[..., ceil(K / 128), N, 4]`; those after the last group of a row are zero.
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        *leading, half = self.codes.shape
        return torch.Size((*leading, 2 * half))

    def fill_randomly(self, std: float) -> None:
        """For measurements and tests. The deviation is within a factor of √2 of `std`."""
        self.codes.random_(256)
        self.scales.fill_(_SCALE_BIAS + round(math.log2(std / _CODES_RMS)))


ExpertMatrix = Matrix | Mxfp4Matrix


def scale_words(size: int) -> int:
    """The words of scales of a row of so many values."""
    return -(-size // (MXFP4_GROUP * TOGETHER))


def put_codes(blocks: Codes, out: Codes) -> None:
    """From the order of checkpoints to that of `Mxfp4Matrix`. `blocks` are `[R, ..., G, 16]`, of
    which the last two axes are contiguous, and `out` is `[R, ..., 16 G]`, contiguous."""
    stored = blocks.view(np.uint64)
    wanted = out.reshape(blocks.shape).view(np.uint64)
    num_rows = max(1, _GROUPS_MAX * blocks.shape[0] * MXFP4_GROUP_BYTES // blocks.size)
    for first in range(0, blocks.shape[0], num_rows):
        rows = slice(first, first + num_rows)
        words = stored[rows].copy()
        _exchange_bytes(words)
        low, high = words[..., 0], words[..., 1]
        even = (high & _LOW_HALVES) << np.uint64(4)
        even |= low & _LOW_HALVES
        odd = (low >> np.uint64(4)) & _LOW_HALVES
        odd |= high & _HIGH_HALVES
        of_first = (odd & _EVEN_QUARTERS) << np.uint64(16)
        np.bitwise_or(of_first, even & _EVEN_QUARTERS, out=wanted[rows, ..., 0])
        of_second = (even >> np.uint64(16)) & _EVEN_QUARTERS
        np.bitwise_or(of_second, odd & _ODD_QUARTERS, out=wanted[rows, ..., 1])


def _exchange_bytes(words: _Words) -> None:
    """Bytes 1 and 4 of each word, and 3 and 6."""
    moved = words >> np.uint64(24)
    moved ^= words
    moved &= np.uint64(0x00000000FF00FF00)
    words ^= moved
    moved <<= np.uint64(24)
    words ^= moved


def put_scales(scales: Codes, out: Codes) -> None:
    """From `[N, G]` to `[ceil(G / 4), N, 4]`."""
    num_rows, groups = scales.shape
    padded = np.zeros((num_rows, out.shape[0] * TOGETHER), dtype=np.uint8)
    padded[:, :groups] = scales
    out.view(np.uint32)[..., 0] = padded.view(np.uint32).T


def in_turns(rows: Codes) -> Codes:
    """A view `[J / 16, 2, 8, ...]` of `[J, ...]` rows of which a row of gate and one of up take
    turns: eight rows of gate, then the eight of up."""
    pairs = rows.reshape(-1, TURN_ROWS, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2)
