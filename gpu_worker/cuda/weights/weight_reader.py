"""Reads tensors of a checkpoint to the device through one pinned buffer. The host holds that buffer
and at most one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.cuda.weights.pinned_memory import pinned

STAGING_VALUES = 2**25


class WeightReader:
    """For one thread. Each read raises CheckpointError."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        staging_values: int = STAGING_VALUES,
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._staging_N = pinned(staging_values, dtype, device)

    def read(self, *names: str) -> Tensor:
        """Tensors in the model's dtype, concatenated along the first axis."""
        shapes = [self._checkpoint.shape(name) for name in names]
        rows = [shape[0] for shape in shapes]
        out = torch.empty((sum(rows), *shapes[0][1:]), device=self._device, dtype=self._dtype)
        for name, part in zip(names, out.split(rows), strict=True):  # type: ignore[no-untyped-call]
            self._copy(name, part.view(-1))
        return out

    def read_exact(self, *names: str) -> Tensor:
        """Small tensors in float32, concatenated along the first axis."""
        return torch.cat([torch.from_numpy(self._checkpoint.read(n)) for n in names]).to(
            self._device
        )

    def _copy(self, name: str, out_N: Tensor) -> None:
        staging_size = self._staging_N.numel()
        if out_N.numel() <= staging_size:
            staged_N = self._staging_N[: out_N.numel()]
            copy_onto_host(self._checkpoint, name, staged_N)
            out_N.copy_(staged_N)
            return
        whole_N = _on_host(self._checkpoint, name)
        for first in range(0, out_N.numel(), staging_size):
            staged_N = self._staging_N[: out_N.numel() - first]
            staged_N.copy_(whole_N[first : first + staging_size])
            out_N[first : first + staging_size].copy_(staged_N)


def copy_onto_host(checkpoint: Checkpoint, name: str, out_N: Tensor) -> None:
    """Reads a tensor, flat and in the dtype of `out_N`. Raises CheckpointError."""
    if out_N.dtype == torch.bfloat16 and checkpoint.stored_dtype(name) == "BF16":
        checkpoint.copy_bits(name, out_N.view(torch.uint16).numpy())
    else:
        out_N.copy_(_on_host(checkpoint, name))


def _on_host(checkpoint: Checkpoint, name: str) -> Tensor:
    """The tensor, flat, in a dtype that loses nothing."""
    if checkpoint.stored_dtype(name) == "BF16":
        return torch.from_numpy(checkpoint.read_bits(name)).view(torch.bfloat16).view(-1)
    return torch.from_numpy(checkpoint.read(name)).view(-1)
