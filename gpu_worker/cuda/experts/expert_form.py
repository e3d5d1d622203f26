"""The form of one expert's weights on a CUDA rank. Slots, copies on the host and staging memory
hold the same parts; on the host they lie one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class ExpertPart(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """`dtype` is the model's. A dense model has one expert, whose inner size is 0."""

    hidden_size: int
    inner_size: int
    dtype: torch.dtype
    biased: bool = False

    @property
    def parts(self) -> tuple[ExpertPart, ...]:
        """Gate and up `[2I, H]`, then down `[H, I]`; if biased, then the biases of the first and of
        the second."""
        hidden, inner = self.hidden_size, self.inner_size
        shapes: list[tuple[int, ...]] = [(2 * inner, hidden), (hidden, inner)]
        if self.biased:
            shapes += [(2 * inner,), (hidden,)]
        return tuple(ExpertPart(self.dtype, shape) for shape in shapes)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def num_values(self) -> int:
        return self.num_bytes // self.dtype.itemsize

    def split(self, values_N: Tensor) -> list[Tensor]:
        """The parts of an expert that lies flat, as views. Raises ValueError if it has another
        size."""
        if values_N.numel() != self.num_values:
            raise ValueError(f"an expert has {self.num_values} values, not {values_N.numel()}")
        pieces = torch.split(values_N, [math.prod(part.shape) for part in self.parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, self.parts, strict=True)]
