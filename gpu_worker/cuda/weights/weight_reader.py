"""Reads tensors of a checkpoint to the device through a little pinned memory. The host holds that
memory and at most one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.cuda.weights.scaled_blocks import (
    BLOCK,
    CODES,
    Matrix,
    ScaledBlocks,
    multiplies_fp8,
    num_blocks,
)
from gpu_worker.cuda.weights.staged_copy import StagedCopy

_PARTS_MAX = 4
"""Of `kernels.linear`, which divides an inner size that is a multiple of BLOCK."""


class WeightReader:
    """For one thread, on its current stream. Each read raises CheckpointError."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        staged_copy: StagedCopy,
    ) -> None:
        """What is read is whole for other streams when `staged_copy` has ended."""
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._staged_copy = staged_copy

    def read(self, *names: str) -> Tensor:
        """Tensors in the model's dtype, concatenated along the first axis."""
        shapes = [self._checkpoint.shape(name) for name in names]
        rows = [shape[0] for shape in shapes]
        out = torch.empty((sum(rows), *shapes[0][1:]), device=self._device, dtype=self._dtype)
        for name, part in zip(names, out.split(rows), strict=True):  # type: ignore[no-untyped-call]
            self._copy(name, part.view(-1))
        return out

    def read_matrix(self, *names: str, in_parts: bool = True) -> Matrix:
        """Matrices of the same width, concatenated along the first axis: in block-scaled FP8 if the
        checkpoint has all of them so and the kernels take them, and else in the model's dtype. With
        `in_parts` they are multiplied by `kernels.linear` as one, which takes parts of whole
        blocks, and blocks that go through all rows; otherwise by that of experts."""
        if not self._stays_scaled(names, in_parts):
            return self.read(*names)
        shapes = [self._checkpoint.shape(name) for name in names]
        parts = [self._read_codes(name, shape) for name, shape in zip(names, shapes, strict=True)]
        codes, scales = zip(*parts, strict=True)
        return ScaledBlocks(torch.cat(codes), torch.cat(scales))

    def read_exact(self, *names: str) -> Tensor:
        """Small tensors in float32, concatenated along the first axis."""
        parts = [torch.from_numpy(self._checkpoint.read(name)) for name in names]
        return torch.cat(parts).to(self._device)

    def _stays_scaled(self, names: Sequence[str], in_parts: bool) -> bool:
        if not multiplies_fp8(self._device):
            return False
        if any(self._checkpoint.fp8_block(name) != (BLOCK, BLOCK) for name in names):
            return False
        shapes = [self._checkpoint.shape(name) for name in names]
        if not in_parts:
            return len({rows for rows, _ in shapes}) == 1
        inner = shapes[0][1]
        has_whole_parts = inner % (_PARTS_MAX * BLOCK) == 0 or inner % BLOCK > 0
        return has_whole_parts and all(rows % BLOCK == 0 for rows, _ in shapes[:-1])

    def _read_codes(self, name: str, shape: Shape) -> tuple[Tensor, Tensor]:
        codes = torch.empty(shape, dtype=CODES)
        scales = torch.empty([num_blocks(size) for size in shape])
        self._checkpoint.copy_codes(name, codes.view(torch.uint8).numpy(), scales.numpy())
        on_device = torch.empty(shape, dtype=CODES, device=self._device)
        self._copy_from_host(codes, on_device)
        return on_device, scales.to(self._device)

    def _copy(self, name: str, out_N: Tensor) -> None:
        if _has_bits_of(out_N, self._checkpoint, name):
            with self._checkpoint.stored_bytes(name) as bytes_B:
                self._staged_copy.copy(bytes_B, out_N)
        else:
            self._copy_from_host(_on_host(self._checkpoint, name).to(out_N.dtype), out_N)

    def _copy_from_host(self, values: Tensor, out: Tensor) -> None:
        self._staged_copy.copy(values.view(-1).view(torch.uint8).numpy(), out)


def copy_onto_host(checkpoint: Checkpoint, name: str, out_N: Tensor) -> None:
    """Reads a tensor, flat and in the dtype of `out_N`. Raises CheckpointError."""
    if _has_bits_of(out_N, checkpoint, name):
        with checkpoint.stored_bytes(name) as bytes_B:
            out_N.view(torch.uint8).numpy()[:] = bytes_B
    else:
        out_N.copy_(_on_host(checkpoint, name))


def _has_bits_of(out_N: Tensor, checkpoint: Checkpoint, name: str) -> bool:
    return out_N.dtype == torch.bfloat16 and checkpoint.stored_dtype(name) == "BF16"


def _on_host(checkpoint: Checkpoint, name: str) -> Tensor:
    """The tensor, flat, in a dtype that loses nothing."""
    if checkpoint.stored_dtype(name) == "BF16":
        return torch.from_numpy(checkpoint.read_bits(name)).view(torch.bfloat16).view(-1)
    return torch.from_numpy(checkpoint.read(name)).view(-1)
