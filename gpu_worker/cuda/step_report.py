"""What a step tells the host, in one copy: the mask of ranks that took part, and the sampled
tokens."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class StepReport:
    """`enqueue` may be captured; the host's side is valid once the step has completed, until the
    next one writes it."""

    def __init__(self, num_ranks: int, step_tokens_max: int, device: torch.device) -> None:
        self._num_ranks = num_ranks
        size = num_ranks + step_tokens_max
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = torch.zeros(size, dtype=torch.int32).pin_memory()
        self._view: NDArray[np.int32] = self._host.numpy()

    def enqueue(self, mask_R: Tensor, tokens_T: Tensor) -> None:
        end = self._num_ranks + tokens_T.numel()
        self._device[: self._num_ranks].copy_(mask_R)
        self._device[self._num_ranks : end].copy_(tokens_T)
        self._host[:end].copy_(self._device[:end], non_blocking=True)

    @property
    def mask(self) -> NDArray[np.int32]:
        return self._view[: self._num_ranks]

    @property
    def tokens(self) -> NDArray[np.int32]:
        return self._view[self._num_ranks :]
