"""Pins host memory, so that the device can copy from it at the full speed of the link."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable


class PinnedBlock:
    """`num_bytes` zero bytes that stay pinned as long as this object lives. They are unpinned
    before they are freed, or CUDA would treat later memory at the same address as pinned. Raises
    OSError if the host refuses."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        advise_huge_pages(pages)
        self.bytes_B = torch.frombuffer(pages, dtype=torch.uint8).zero_()
        pin(self.bytes_B, device)
        self._unpin = weakref.finalize(self, unpin, self.bytes_B, device)
        self._unpin.atexit = False

    def unpin(self) -> None:
        """No copy from it may be in flight."""
        self._unpin()


def pin(bytes_B: Tensor, device: torch.device) -> None:
    """Pins whole pages. Touch them first: pinning holds a lock that kernel launches need, and is
    short if the pages exist. Does nothing if the device is not a CUDA device. Raises OSError if the
    host refuses."""
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        error = int(_runtime().cudaHostRegister(bytes_B.data_ptr(), bytes_B.nbytes, _PORTABLE))
        if error != 0:
            with suppress(RuntimeError):  # clears the error, which CUDA keeps for the next launch
                torch.ones(1, device=device)
            raise OSError(f"CUDA error {error} when pinning {bytes_B.nbytes:,} bytes")


def unpin(bytes_B: Tensor, device: torch.device) -> None:
    """Unpins a piece that `pin` pinned as a whole. No copy from it may be in flight."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            _runtime().cudaHostUnregister(bytes_B.data_ptr())


def advise_huge_pages(pages: mmap.mmap) -> None:
    with suppress(OSError):  # this kernel has none
        pages.madvise(mmap.MADV_HUGEPAGE)


def touch_pages(bytes_B: Tensor) -> None:
    """Makes every page exist, without changing its content."""
    bytes_B[:: mmap.PAGESIZE].sum()


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def pinned(num_values: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros for staging, in pinned memory; in plain memory if the device is not a CUDA device."""
    return torch.zeros(num_values, dtype=dtype, pin_memory=device.type == "cuda")
