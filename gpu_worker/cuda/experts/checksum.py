"""A checksum of one expert's weights, on any device: of what was read, and of what has arrived in a
slot. It finds damage, not forgery."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.cuda.experts.expert_form import ExpertForm

_COLUMNS_MAX = 1024
_OTHER_AXIS = 0x1E3779B97F4A7C15  # odd: no bit of a factor is lost
_INTEGERS = {1: torch.int32, 2: torch.int16, 4: torch.int32}
"""By the bytes of a value. Codes of one byte are read four at a time: there are a multiple."""


def checksum(parts: Sequence[Tensor]) -> Tensor:
    """A 64-bit number, as a tensor on the weights' device. The parts are contiguous, of any shape.
    Every single changed value changes it, and so does an exchange of two values, unless it is of
    different rows and columns at once and happens to cancel out."""
    total = _fold(parts[-1])
    for place, part in enumerate(reversed(parts[:-1]), start=1):
        total = total + _fold(part) * (2 * place + 1)
    return total


def checksum_of(values_N: Tensor, form: ExpertForm) -> int:
    """Of one expert, flat as `SlotUpload.values`. Reads it twice."""
    return int(checksum(form.split(values_N)))


def _fold(values: Tensor) -> Tensor:
    """The values lie in rows and columns. Sums of both, each times an odd number of its own; all
    modulo 2⁶⁴."""
    if not values.numel():
        return torch.zeros((), dtype=torch.int64, device=values.device)
    words_N = values.view(-1).view(_INTEGERS[values.element_size()])
    words_RC = words_N.view(-1, math.gcd(words_N.numel(), _COLUMNS_MAX))
    rows_R = words_RC.sum(dim=1, dtype=torch.int64)
    columns_C = words_RC.sum(dim=0, dtype=torch.int64)
    return _weighted(rows_R) + _OTHER_AXIS * _weighted(columns_C)


def _weighted(sums: Tensor) -> Tensor:
    odd = torch.arange(1, 2 * sums.numel(), 2, device=sums.device)
    return (sums * odd).sum()
