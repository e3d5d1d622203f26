"""Reads tensors into the memory layout of the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.cpu.kernels.tiles import PANEL, pack

Floats = NDArray[np.float32]
Weights = NDArray[Any]
"""Float32, or bfloat16 as uint16: see `kernels.tiles`."""


def read_vector(checkpoint: Checkpoint, name: str) -> Floats:
    """As float32, in the stored shape."""
    return checkpoint.read(name)


def weights_dtype(checkpoint: Checkpoint) -> np.dtype[Any]:
    """The dtype of all weights in panels: uint16 (bfloat16 bits) or float32."""
    return np.dtype(np.uint16 if checkpoint.is_bfloat16 else np.float32)


def read_weight(checkpoint: Checkpoint, name: str) -> Weights:
    """A matrix as stored, `[outputs, inputs]`, in `weights_dtype`."""
    return checkpoint.read_bits(name) if checkpoint.is_bfloat16 else checkpoint.read(name)


def read_weight_part(checkpoint: Checkpoint, name: str, index: int) -> Weights:
    """One index of the leading axis, in `weights_dtype`."""
    if checkpoint.is_bfloat16:
        return checkpoint.read_bits_part(name, index)
    return checkpoint.read_part(name, index)


def read_panels(checkpoint: Checkpoint, *names: str) -> Weights:
    """Several matrices side by side, as one `[inputs, all outputs]` in panels."""
    shapes = [checkpoint.shape(name) for name in names]
    dtype = weights_dtype(checkpoint)
    panels = empty_panels((), shapes[0][1], sum(outputs for outputs, _ in shapes), dtype)
    first = 0
    for name, (outputs, _) in zip(names, shapes, strict=True):  # one at a time in memory
        pack(read_weight(checkpoint, name).T, panels, first)
        first += outputs
    return panels


def empty_panels(
    leading: tuple[int, ...], num_inputs: int, num_outputs: int, dtype: np.dtype[Any]
) -> Weights:
    """Zeros, `[*leading, panels, num_inputs, PANEL]`."""
    return np.zeros((*leading, -(-num_outputs // PANEL), num_inputs, PANEL), dtype=dtype)


def read_matrix(checkpoint: Checkpoint, name: str) -> Floats:
    """A float32 matrix, transposed to `[inputs, outputs]`."""
    return np.array(checkpoint.read(name).T, order="C")
