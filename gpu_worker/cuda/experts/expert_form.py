"""The form of one expert's weights on a CUDA rank: in plain numbers of the model's dtype, or in
those that the checkpoint stores, block-scaled FP8 or MXFP4; with or without biases. Slots, copies
on the host and staging memory hold the same parts; on the host they lie one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_worker.cuda.weights.mxfp4_matrix import TOGETHER, scale_words
from gpu_worker.cuda.weights.scaled_blocks import CODES, num_blocks


class NumberFormat(Enum):
    """Of the matrices of experts: plain numbers, `scaled_blocks.ScaledBlocks` or
    `mxfp4_matrix.Mxfp4Matrix`."""

    PLAIN = "plain"
    FP8 = "block-scaled FP8"
    MXFP4 = "MXFP4"


class ExpertPart(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """`dtype` is the model's, and that of biases, which experts in FP8 do not have. A dense model
    has one expert, whose inner size is 0."""

    hidden_size: int
    inner_size: int
    dtype: torch.dtype
    number_format: NumberFormat = NumberFormat.PLAIN
    biased: bool = False

    def __post_init__(self) -> None:
        is_fp8 = self.number_format is NumberFormat.FP8
        assert not (is_fp8 and self.biased), "no kernel adds biases to products in FP8"

    @property
    def parts(self) -> tuple[ExpertPart, ...]:
        """Gate and up `[2I, H]`, then down `[H, I]`; if they are codes, then the scales of the
        first and of the second; if biased, then their biases."""
        hidden, inner = self.hidden_size, self.inner_size
        biases: tuple[ExpertPart, ...] = ()
        if self.biased:
            biases = (ExpertPart(self.dtype, (2 * inner,)), ExpertPart(self.dtype, (hidden,)))
        return (*self._weights, *biases)

    @property
    def _weights(self) -> tuple[ExpertPart, ...]:
        hidden, inner = self.hidden_size, self.inner_size
        if self.number_format is NumberFormat.FP8:
            across, deep = num_blocks(hidden), num_blocks(inner)
            return (
                ExpertPart(CODES, (2 * inner, hidden)),
                ExpertPart(CODES, (hidden, inner)),
                ExpertPart(torch.float32, (2 * deep, across)),
                ExpertPart(torch.float32, (across, deep)),
            )
        if self.number_format is NumberFormat.MXFP4:
            return (
                ExpertPart(torch.uint8, (2 * inner, hidden // 2)),
                ExpertPart(torch.uint8, (hidden, inner // 2)),
                ExpertPart(torch.uint8, (scale_words(hidden), 2 * inner, TOGETHER)),
                ExpertPart(torch.uint8, (scale_words(inner), hidden, TOGETHER)),
            )
        return (
            ExpertPart(self.dtype, (2 * inner, hidden)),
            ExpertPart(self.dtype, (hidden, inner)),
        )

    @property
    def has_scales(self) -> bool:
        return self.number_format is not NumberFormat.PLAIN

    @property
    def name(self) -> str:
        """For people."""
        if self.has_scales:
            return self.number_format.value
        return str(self.dtype).removeprefix("torch.")

    @property
    def flat_dtype(self) -> torch.dtype:
        """Of an expert in one flat piece of memory."""
        return torch.uint8 if self.has_scales else self.dtype

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
