"""Pinning memory of the host, which lets the device copy from it as fast as the link allows."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable


class PinnedBlock:
    """Zeros of `num_bytes`, as bytes, pinned as long as the block lives: CUDA must not take other
    memory at its address for it. Raises OSError where the host refuses."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        advise_huge_pages(pages)
        self.bytes_B = torch.frombuffer(pages, dtype=torch.uint8).zero_()
        pin(self.bytes_B, device)
        self._unpin = weakref.finalize(self, unpin, self.bytes_B, device)
        self._unpin.atexit = False

    def unpin(self) -> None:
        """No copy from it may be under way."""
        self._unpin()


def pin(bytes_B: Tensor, device: torch.device) -> None:
    """Whole pages, which have come into being before: pinning holds a lock that kernel launches
    need, and is then short. Nothing where there is no CUDA device. Raises OSError where the host
    refuses."""
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        error = int(_runtime().cudaHostRegister(bytes_B.data_ptr(), bytes_B.nbytes, _PORTABLE))
        if error != 0:
            with suppress(RuntimeError):  # CUDA keeps the error for the next launch to find
                torch.ones(1, device=device)
            raise OSError(f"CUDA error {error} when pinning {bytes_B.nbytes:,} bytes")


def unpin(bytes_B: Tensor, device: torch.device) -> None:
    """What `pin` has pinned, in the same pieces; no copy from it may be under way."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            _runtime().cudaHostUnregister(bytes_B.data_ptr())


def advise_huge_pages(pages: mmap.mmap) -> None:
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)


def touch_pages(bytes_B: Tensor) -> None:
    """Every page, without a change to what stands there."""
    bytes_B[:: mmap.PAGESIZE].sum()


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def pinned(num_values: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For staging; where there is no CUDA device, plain memory."""
    return torch.zeros(num_values, dtype=dtype, pin_memory=device.type == "cuda")
