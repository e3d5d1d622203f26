"""Reads one expert from a checkpoint into host memory, in the layout of a CUDA rank's slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.checkpoint.mlp_names import USUAL_NAMES
from gpu_worker.cuda.weights.weight_reader import copy_onto_host


class ExpertReader:
    """May be used by several threads. `prefix_of` takes a MoE layer and an expert, and returns what
    the names of the expert's tensors begin with."""

    def __init__(
        self, checkpoint: Checkpoint, prefix_of: Callable[[int, int], str], dtype: torch.dtype
    ) -> None:
        self._checkpoint = checkpoint
        self._prefix_of = prefix_of
        self.dtype = dtype
        names = self._names(0, 0)
        self.num_values = sum(_size(checkpoint, name) for name in names)

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize

    def read(self, layer: int, expert: int, out_N: Tensor) -> None:
        """Writes gate, up and down, flat, to `out_N`. Raises CheckpointError."""
        first = 0
        for name in self._names(layer, expert):
            end = first + _size(self._checkpoint, name)
            copy_onto_host(self._checkpoint, name, out_N[first:end])
            first = end

    def _names(self, layer: int, expert: int) -> list[str]:
        prefix = self._prefix_of(layer, expert)
        return [f"{prefix}.{name}.weight" for name in USUAL_NAMES]


def _size(checkpoint: Checkpoint, name: str) -> int:
    rows, columns = checkpoint.shape(name)
    return rows * columns
