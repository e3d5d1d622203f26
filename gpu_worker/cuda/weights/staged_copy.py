"""Copies host memory that is not pinned to the device: several threads fill one pinned buffer while
the device reads the other. One thread alone maps the pages of a file at a twentieth of the link's
speed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.cuda.weights.pinned_memory import pinned

STAGING_BYTES = 2**25
"""Of each of the two buffers."""
NUM_THREADS = 8
_PIECE_BYTES = 2**22
"""What one thread copies at a time. Less is not worth another thread."""


class StagedCopy:
    """For one thread, on its current stream. As a context manager: at its end all that was copied
    is on the device, for any stream."""

    def __init__(self, device: torch.device, *, staging_bytes: int = STAGING_BYTES) -> None:
        self._device = device
        self._buffers = tuple(pinned(staging_bytes, torch.uint8, device) for _ in range(2))
        self._read_by_device: list[torch.cuda.Event | None] = [None, None]
        self._next = 0
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="staged-copy")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def copy(self, from_B: NDArray[np.uint8], out: Tensor) -> None:
        """The bytes of a contiguous tensor. `from_B` may be gone when this returns; the tensor is
        whole for what the current stream does later."""
        out_B = out.view(-1).view(torch.uint8)
        assert out_B.numel() == from_B.size, f"{from_B.size} bytes for {out_B.numel()}"
        staging_bytes = self._buffers[0].numel()
        for first in range(0, from_B.size, staging_bytes):
            part_B = from_B[first : first + staging_bytes]
            with self._buffer(part_B.size) as staged_B:
                self._fill(staged_B.numpy(), part_B)
                out_B[first : first + part_B.size].copy_(staged_B, non_blocking=True)

    @contextmanager
    def _buffer(self, num_bytes: int) -> Iterator[Tensor]:
        """One that the device has read. Copies from it are enqueued in the `with` block."""
        index, self._next = self._next, 1 - self._next
        if (read := self._read_by_device[index]) is not None:
            read.synchronize()
        yield self._buffers[index][:num_bytes]
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._read_by_device[index] = event

    def _fill(self, into_B: NDArray[np.uint8], from_B: NDArray[np.uint8]) -> None:
        if from_B.size <= _PIECE_BYTES:
            into_B[:] = from_B
            return
        pieces = [slice(i, i + _PIECE_BYTES) for i in range(0, from_B.size, _PIECE_BYTES)]
        list(self._threads.map(lambda piece: np.copyto(into_B[piece], from_B[piece]), pieces))
