"""A checksum of one expert's weights, on any device: of what was read, and of what has arrived in a
slot. It finds damage, not forgery."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gpu_worker.cuda.experts.expert_form import ExpertForm

_WORDS = (torch.int32, torch.int16, torch.uint8)
_MIX_1, _MIX_2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The multipliers of splitmix64's finaliser (Steele, Lea, Flood 2014), as signed numbers."""


def checksum(parts: Sequence[Tensor]) -> Tensor:
    """A 64-bit number, as a tensor on the weights' device. The parts are contiguous, of any shape.
    Every single changed bit changes it, and so does an exchange of two values, unless the factors
    of their words happen to cancel it out.

    It is few operations on the device, because many experts are checked while everybody waits."""
    total = _fold(parts[-1])
    for place, part in enumerate(reversed(parts[:-1]), start=1):
        total = total + _fold(part) * (2 * place + 1)
    return total


def checksum_of(values_N: Tensor, form: ExpertForm) -> int:
    """Of one expert, flat as `SlotUpload.values`."""
    return int(checksum(form.split(values_N)))


def _fold(values: Tensor) -> Tensor:
    """The sum of all 32-bit words (or shorter ones, if there is no whole number of these), each
    times an odd 64-bit number of its own, so that no bit is lost; modulo 2⁶⁴."""
    bytes_B = values.view(-1).view(torch.uint8)
    word = next(dtype for dtype in _WORDS if bytes_B.numel() % dtype.itemsize == 0)
    words_N = bytes_B.view(word)
    return (words_N * _odd_factors(words_N.numel(), values.device)).sum()


@lru_cache(maxsize=8)
def _odd_factors(num: int, device: torch.device) -> Tensor:
    """`[num]` int64. They have no pattern: with rising ones an exchange of values at a distance of
    a power of two could cancel out."""
    mixed_N = torch.arange(num, device=device)
    for multiplier, shift in ((_MIX_1, 30), (_MIX_2, 27), (1, 31)):
        mixed_N = (mixed_N ^ (mixed_N >> shift)) * multiplier
    return mixed_N | 1
