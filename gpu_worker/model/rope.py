"""Rotary position embeddings: tables of cosines and sines by position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def plain_rotations(theta: float, size: int, context_tokens: int) -> tuple[Floats, Floats]:
    """`[C, size/2]`: cosines and sines of position * theta^(-2i/size)."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    return rotations(np.float32(1.0) / powers, context_tokens)


def rotations(inverse_frequencies: Floats, context_tokens: int) -> tuple[Floats, Floats]:
    """The angles are rounded to float32 as in the reference, their functions are exact, so that all
    machines agree."""
    positions = np.arange(context_tokens, dtype=np.float32)
    angles = (positions[:, None] * inverse_frequencies[None, :]).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
