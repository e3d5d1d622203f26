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
    return np.ascontiguousarray(np.concatenate([checkpoint.read(name) for name in names]).T)
