"""The form of one expert's weights on a CUDA rank: in plain numbers of the model's dtype, or in
block-scaled FP8 as the checkpoint stores them; plain ones with or without biases. Slots, copies on
the host and staging memory hold the same parts; on the host they lie one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_worker.cuda.weights.scaled_blocks import CODES, num_blocks


class ExpertPart(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """`dtype` is the model's. `scaled` experts are `scaled_blocks.ScaledBlocks`, and have no
    biases. A dense model has one expert, whose inner size is 0."""

    hidden_size: int
    inner_size: int
    dtype: torch.dtype
    scaled: bool = False
    biased: bool = False

    def __post_init__(self) -> None:
        assert not (self.scaled and self.biased), "no kernel adds biases to scaled products"

    @property
    def parts(self) -> tuple[ExpertPart, ...]:
        """Gate and up `[2I, H]`, then down `[H, I]`; if scaled, both as codes, then the scales of
        the first and of the second; if biased, then their biases."""
        hidden, inner = self.hidden_size, self.inner_size
        dtype = CODES if self.scaled else self.dtype
        weights = (ExpertPart(dtype, (2 * inner, hidden)), ExpertPart(dtype, (hidden, inner)))
        if self.biased:
            biases = (ExpertPart(dtype, (2 * inner,)), ExpertPart(dtype, (hidden,)))
            return (*weights, *biases)
        if not self.scaled:
            return weights
        across, deep = num_blocks(hidden), num_blocks(inner)
        return (
            *weights,
            ExpertPart(torch.float32, (2 * deep, across)),
            ExpertPart(torch.float32, (across, deep)),
        )

    @property
    def name(self) -> str:
        """For people."""
        return "block-scaled FP8" if self.scaled else str(self.dtype).removeprefix("torch.")

    @property
    def flat_dtype(self) -> torch.dtype:
        """Of an expert in one flat piece of memory."""
        return torch.uint8 if self.scaled else self.dtype

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def num_values(self) -> int:
        """Of `flat_dtype`."""
        return self.num_bytes // self.flat_dtype.itemsize

    def split(self, values_N: Tensor) -> list[Tensor]:
        """The parts of an expert that lies flat, as views. Raises ValueError if it has another
        size."""
        if values_N.numel() != self.num_values:
            raise ValueError(f"an expert has {self.num_values} values, not {values_N.numel()}")
        sizes = [part.num_bytes // self.flat_dtype.itemsize for part in self.parts]
        pieces = torch.split(values_N, sizes)
        return [
            piece.view(part.dtype).view(part.shape)
            for piece, part in zip(pieces, self.parts, strict=True)
        ]
