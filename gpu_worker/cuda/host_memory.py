"""Memory of the host: how much is free, and pinning, which lets the device copy from it."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable

MEMORY_INFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


class PinnedBlock:
    """Zeros of `num_bytes`, as bytes. The pages come into being before they are pinned: pinning
    holds a lock that kernel launches need, and is then short. Raises OSError where the host
    refuses."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        self.bytes_B = torch.frombuffer(pages, dtype=torch.uint8).zero_()
        self._device = device
        self._is_pinned = False
        if device.type == "cuda":
            with torch.cuda.device(device):
                error = _runtime().cudaHostRegister(self.bytes_B.data_ptr(), num_bytes, _PORTABLE)
            if int(error) != 0:
                raise OSError(f"CUDA error {int(error)} when pinning {num_bytes:,} bytes")
            self._is_pinned = True

    def unpin(self) -> None:
        """No copy from it may be under way."""
        if self._is_pinned:
            self._is_pinned = False
            with torch.cuda.device(self._device):
                _runtime().cudaHostUnregister(self.bytes_B.data_ptr())


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def pinned(num_values: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For staging; where there is no CUDA device, plain memory."""
    return torch.zeros(num_values, dtype=dtype, pin_memory=device.type == "cuda")


def free_bytes(memory_info: Path = MEMORY_INFO, control_group: Path = CONTROL_GROUP) -> int:
    """What could be taken now, page cache included, under our control group's limit."""
    lines = (line.split() for line in memory_info.read_text().splitlines())
    free = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    limit = control_group / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        used = int((control_group / "memory.current").read_text())
        statistics = (control_group / "memory.stat").read_text().split()
        cached = int(statistics[statistics.index("file") + 1])
        free = min(free, int(text) - used + cached)
    return max(0, free)
