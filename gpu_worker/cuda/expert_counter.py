"""Counts of experts that kernels keep on the card, read beside the steps."""

from __future__ import annotations

import asyncio

import numpy as np
import torch
from torch import Tensor

from gpu_worker.cuda.streams import on_stream
from gpu_worker.exchange.expert_counter import ExpertReading


class CudaExpertCounter:
    """Implements `ExpertCounter`. `chosen_LE` and `computed_L`, int32, are added to by kernels of
    steps. A reading copies them on a stream of its own, so that no step waits for it. Counts go on
    from one incarnation of a process to the next."""

    def __init__(self, chosen_LE: Tensor, computed_L: Tensor, *, spread: bool) -> None:
        self.spread = spread
        self._counts = (chosen_LE, computed_L)
        self._device = chosen_LE.device
        self._host = [
            torch.empty(c.shape, dtype=c.dtype, pin_memory=c.device.type == "cuda")
            for c in self._counts
        ]
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    async def read(self) -> ExpertReading:
        return await asyncio.to_thread(self._read)

    def _read(self) -> ExpertReading:
        with torch.cuda.device(self._device), on_stream(self._stream):
            for host, counts in zip(self._host, self._counts, strict=True):
                host.copy_(counts, non_blocking=True)
            self._stream.synchronize()
        chosen_LE, computed_L = (host.numpy().astype(np.uint32) for host in self._host)
        return ExpertReading(chosen_LE, computed_L)
