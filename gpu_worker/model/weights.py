"""Reading tensors into the layout that the kernels want."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_worker.model.checkpoint import Checkpoint

Floats = NDArray[np.float32]


def read_vector(checkpoint: Checkpoint, name: str) -> Floats:
    """As stored."""
    return checkpoint.read(name)


def read_matrix(checkpoint: Checkpoint, name: str) -> Floats:
    """Transposed to `[inputs, outputs]`."""
    return np.array(checkpoint.read(name).T, order="C")


def read_matrices(checkpoint: Checkpoint, *names: str) -> Floats:
    """Side by side, as one matrix: `[inputs, all outputs]`."""
    sizes = [checkpoint.shape(name) for name in names]
    whole: Floats = np.empty((sizes[0][1], sum(rows for rows, _ in sizes)), dtype=np.float32)
    first = 0
    for name, (rows, _) in zip(names, sizes, strict=True):  # one at a time in memory
        whole[:, first : first + rows] = checkpoint.read(name).T
        first += rows
    return whole
