"""Working memory of a forward. It is kept between steps and only grows, so that a step allocates
nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class TokenScratch:
    """Arrays for the rank's own tokens of a step. Rows after the step's tokens are undefined."""

    def __init__(self, *, hidden_size: int, top_k: int) -> None:
        self._hidden_size = hidden_size
        self._top_k = top_k
        self._allocate(0)

    def grow(self, num_tokens: int) -> None:
        if num_tokens > self.x_TH.shape[0]:
            self._allocate(next_capacity(num_tokens))

    def _allocate(self, num_tokens: int) -> None:
        self.x_TH: Floats = np.empty((num_tokens, self._hidden_size), dtype=np.float32)
        self.h_TH: Floats = np.empty((num_tokens, self._hidden_size), dtype=np.float32)
        self.weights_TK: Floats = np.empty((num_tokens, self._top_k), dtype=np.float32)
        self.experts_TK: NDArray[np.int32] = np.empty((num_tokens, self._top_k), dtype=np.int32)
        self.rows_T: NDArray[np.int32] = np.arange(num_tokens, dtype=np.int32)
        self.zeros_T: NDArray[np.int32] = np.zeros(num_tokens, dtype=np.int32)


def next_capacity(count: int) -> int:
    """The next power of two, so that a growing load causes few reallocations."""
    return 1 << (count - 1).bit_length()


def prefaulted_zeros(*shape: int) -> Floats:
    """Zeros whose pages are written now: on a virtual machine the first touch of new memory costs
    milliseconds for each page, which must not happen during a step."""
    zeros: Floats = np.empty(shape, dtype=np.float32)
    zeros.fill(0.0)
    return zeros
