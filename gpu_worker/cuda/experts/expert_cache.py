"""Copies of experts in memory that a host's ranks share: the layout of the memory, which copies
are complete, and who fills which. Reads no checkpoint.

The memory holds a header, one byte per entry, the entries' checksums, and the entries. The first
rank writes the header, once; a rank whose header differs does not use the memory. The byte of an
entry says that its copy is complete, and from then on nobody writes the copy again. Whoever fills
an entry holds a lock on that byte. The kernel releases the lock if the process ends for any reason,
and then another process fills the entry. A copy that has turned out to be damaged is rejected, and
nobody uses its entry any more. The header determines which expert an entry is for, so it is the
same for all. If there are fewer entries than experts, every layer gets its share.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_worker.cuda.experts.checksum import checksum_of
from gpu_worker.cuda.experts.expert_form import ExpertForm
from gpu_worker.cuda.weights.pinned_memory import advise_huge_pages, pin, touch_pages, unpin
from shared.expert_cache_memory import ExpertCacheMemory

_HEADER_BYTES = 2**16
_STATES_AT = _HEADER_BYTES
_ENTRIES_ALIGN = 2 * 2**20  # a huge page
_PIECE_BYTES = 2**28
_LENGTH = struct.Struct("<I")
_FLOCK = struct.Struct("hhqqi4x")
_COMPLETE = 1
_REJECTED = 2
_CHECKSUM = np.dtype("<i8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCacheHeader:
    """What a cache holds. An expert has `num_values` values of `dtype`, which are bytes if it is
    block-scaled FP8 or MXFP4. Layers are MoE layers.
    `form` is the version of the cache's own layout. `folder` is only for error messages."""

    folder: str
    fingerprint: str  # of the checkpoint
    dtype: str
    num_values: int
    num_layers: int
    num_experts: int
    form: int = 3

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """How another header differs from this one; None if it does not."""
        for name, ours in dataclasses.asdict(self).items():
            theirs = other.get(name)
            if theirs != ours and name != "folder":
                return f"they are of {other.get('folder')}, whose {name} is {theirs}, not {ours}"
        return None


class ExpertCache:
    """May be used by several threads, which are to each other like other processes."""

    def __init__(
        self, memory: ExpertCacheMemory, header: ExpertCacheHeader, form: ExpertForm
    ) -> None:
        """Raises OSError, and ValueError if the memory holds something else."""
        self._fd = memory.fd
        self._form = form
        self._num_layers, num_pairs = header.num_layers, header.num_layers * header.num_experts
        self._expert_bytes = form.num_bytes
        usable_bytes = min(memory.bytes_max, os.fstat(self._fd).st_size)
        self._pinned: list[tuple[Tensor, torch.device]] = []
        self._checksums_at = _round_up(_STATES_AT + num_pairs, _CHECKSUM.itemsize)
        checksums_end = self._checksums_at + num_pairs * _CHECKSUM.itemsize
        first = _round_up(checksums_end, _ENTRIES_ALIGN)
        each = _round_up(self._expert_bytes, mmap.PAGESIZE)
        self.num_entries = max(0, min(num_pairs, (usable_bytes - first) // each))
        self._is_pinned_P = np.zeros(self.num_entries, dtype=bool)
        if self.num_entries:
            self._check(header)
            self._map(first, each)

    def layer_and_expert_of(self, entry: int) -> tuple[int, int]:
        expert, layer = divmod(entry, self._num_layers)
        return layer, expert

    def entry_of(self, layer: int, expert: int) -> int | None:
        entry = expert * self._num_layers + layer
        return entry if entry < self.num_entries else None

    def is_complete(self, entry: int) -> bool:
        return bool(self._states_P[entry] == _COMPLETE)

    def num_complete(self) -> int:
        return int(np.count_nonzero(self._states_P == _COMPLETE)) if self.num_entries else 0

    def entry_values(self, entry: int) -> Tensor:
        """The entry's memory, flat as `SlotUpload.values`. Valid until `close`."""
        return self._entries_PB[entry, : self._expert_bytes].view(self._form.flat_dtype)

    def checksum(self, entry: int) -> int:
        """Of a complete entry, as it was when it was filled."""
        return int(self._checksums_P[entry])

    def reject(self, entry: int) -> None:
        """The copy is damaged: nobody uses the entry any more."""
        self._states_P[entry] = _REJECTED

    def fill(self, entry: int, write: Callable[[Tensor], None], *, wait: bool) -> bool:
        """Calls `write` for the entry, unless it is complete or rejected. If another process or
        thread is filling it, returns False; with `wait`, waits until that one finishes or ends."""
        if self._states_P[entry]:
            return True
        with _locked(self._fd, _STATES_AT + entry, wait=wait) as is_ours:
            if is_ours and not self._states_P[entry]:
                write(self.entry_values(entry))
                self._checksums_P[entry] = checksum_of(self.entry_values(entry), self._form)
                self._states_P[entry] = _COMPLETE
        return is_ours

    def is_pinned(self, entry: int) -> bool:
        return bool(self._is_pinned_P[entry])

    def pin(self, device: torch.device, may_go_on: Callable[[], bool]) -> None:
        """Pins the entries, piece after piece, as long as that may go on. It holds a lock of the
        driver that steps need. Raises OSError if the host refuses."""
        if device.type != "cuda" or not self.num_entries:
            return
        size = max(1, _PIECE_BYTES // self._entries_PB.shape[1])
        # Ranks that start together begin at different entries, so pages are created in parallel.
        starts = deque(range(0, self.num_entries, size))
        starts.rotate(os.getpid() % len(starts))
        for start in starts:
            if not may_go_on():
                return
            piece_B = self._entries_PB[start : start + size].view(-1)
            touch_pages(piece_B)
            pin(piece_B, device)
            self._pinned.append((piece_B, device))
            self._is_pinned_P[start : start + size] = True

    def close(self) -> None:
        """No copy may be in use any more."""
        for piece_B, device in self._pinned:
            unpin(piece_B, device)
        self._pinned.clear()
        self.num_entries = 0

    def _check(self, header: ExpertCacheHeader) -> None:
        text = json.dumps(dataclasses.asdict(header)).encode()
        assert len(text) <= _HEADER_BYTES - _LENGTH.size
        with _locked(self._fd, 0, wait=True):
            (length,) = _LENGTH.unpack(os.pread(self._fd, _LENGTH.size, 0))
            if length == 0:
                os.pwrite(self._fd, text, _LENGTH.size)
                os.pwrite(self._fd, _LENGTH.pack(len(text)), 0)
                return
            difference = header.difference(json.loads(os.pread(self._fd, length, _LENGTH.size)))
        if difference is not None:
            raise ValueError(f"the copies of experts on this host are others: {difference}")

    def _map(self, first: int, each: int) -> None:
        mapped = mmap.mmap(self._fd, first + self.num_entries * each, flags=mmap.MAP_SHARED)
        advise_huge_pages(mapped)
        self._states_P = np.frombuffer(mapped, np.uint8, self.num_entries, _STATES_AT)
        self._checksums_P = np.frombuffer(mapped, _CHECKSUM, self.num_entries, self._checksums_at)
        entries_B = torch.frombuffer(mapped, dtype=torch.uint8, offset=first)
        self._entries_PB = entries_B.view(self.num_entries, each)


@contextmanager
def _locked(fd: int, byte: int, *, wait: bool) -> Iterator[bool]:
    """Yields whether we got the lock, and holds it while the block runs. It belongs to the file
    description that is opened here, so other users of `fd` do not share it."""
    opened = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield _lock(opened, byte, wait=wait)
    finally:
        os.close(opened)


def _lock(opened: int, byte: int, *, wait: bool) -> bool:
    how = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    try:
        fcntl.fcntl(opened, how, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except BlockingIOError:
        return False
    return True


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
