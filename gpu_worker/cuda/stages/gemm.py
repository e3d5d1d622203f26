"""A dense GEMM of a step, with the buffer for its result. The buffer is allocated once for the
largest step, so that every graph holds the same addresses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.cuda.kernels.linear import (
    PARTS_ROWS_MAX,
    linear_parts,
    linear_whole,
    num_parts,
)
from gpu_worker.cuda.weights.scaled_blocks import Matrix, ScaledBlocks


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAllocator:
    """Allocates a step's buffers. With `invariant`, dense GEMMs are computed in fixed parts, so
    that the bits of a row do not depend on its batch; without it, torch computes them."""

    tokens_max: int
    invariant: bool
    device: torch.device
    dtype: torch.dtype

    def zeros(self, *shape: int, of: torch.dtype | None = None) -> Tensor:
        """Of the model's dtype by default. They must be finite, because padding rows are computed
        too."""
        return torch.zeros(shape, device=self.device, dtype=of or self.dtype)


class Gemm:
    """`y = x wᵀ` as P parts that the next kernel adds. If batch-invariant, they are float32, and a
    single one for many rows; otherwise there is one part of the model's dtype."""

    def __init__(
        self,
        allocator: StepAllocator,
        *,
        inner: int,
        columns: int,
        rows_max: int | None = None,
        in_parts: bool = True,
    ) -> None:
        self._invariant = allocator.invariant
        self._parts = num_parts(inner) if allocator.invariant and in_parts else 1
        self._columns = columns
        rows_max = rows_max or allocator.tokens_max
        dtype = torch.float32 if allocator.invariant else allocator.dtype
        rows = max(self._parts * min(rows_max, PARTS_ROWS_MAX), rows_max)
        self._out = allocator.zeros(rows * columns, of=dtype)

    def run(self, x_TK: Tensor, w_NK: Matrix) -> Tensor:
        """`[P, T, N]`, valid until the next call. The library's product takes no scaled weights:
        those are always computed batch-invariantly."""
        out_PTN = self.result_view(x_TK.shape[0])
        if self._invariant and x_TK.shape[0] > PARTS_ROWS_MAX:
            linear_whole(x_TK, w_NK, out_PTN[0], parts=self._parts)
        elif self._invariant:
            linear_parts(x_TK, w_NK, out_PTN)
        elif isinstance(w_NK, ScaledBlocks):
            linear_whole(x_TK, w_NK, out_PTN[0], parts=1)
        else:
            torch.mm(x_TK, w_NK.T, out=out_PTN[0])
        return out_PTN

    def result_view(self, rows: int) -> Tensor:
        """The buffer, `[P, T, N]`, in which `run` returns the result for `rows` rows."""
        parts = 1 if rows > PARTS_ROWS_MAX else self._parts
        return self._out[: parts * rows * self._columns].view(parts, rows, self._columns)
