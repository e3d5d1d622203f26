"""The memory that copies of experts lie in: a file without a name, which whoever holds a descriptor
of it shares, and which is gone with the last of them, however they ended. Knows nothing of what
lies in it."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass

import structlog

from shared.free_memory import free_bytes

log = structlog.get_logger()

_NAME = "starfish-experts"
_LINK = f"/memfd:{_NAME}"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_SHARE_OF_FREE = 4
_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCacheMemory:
    """`bytes_max`: what this process uses of it, from the start."""

    fd: int
    bytes_max: int


def expert_cache_bytes(host_experts_gb: float, free_bytes: int) -> int:
    """Below 0: a quarter of what is free, so that most stays with the page cache, which copies are
    filled from. Never more than is free: the kernel would end a process for it."""
    if host_experts_gb < 0:
        return free_bytes // _SHARE_OF_FREE
    return min(int(host_experts_gb * _GB), free_bytes)


def create_memory(num_bytes: int) -> int:
    """Zeros; a page takes room once it is touched. Nobody can shrink it under others. Raises
    OSError."""
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def open_memory_of_process(pid: int, fd: int) -> int:
    """What another process has under this number, as a descriptor of ours. Raises OSError where
    that is no such memory."""
    ours = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    if not os.readlink(f"/proc/self/fd/{ours}").startswith(_LINK):
        os.close(ours)
        raise OSError(f"descriptor {fd} of process {pid} is not memory for copies of experts")
    return ours


def expert_cache_memory_of_rank(
    inherited_fd: int, host_experts_gb: float
) -> ExpertCacheMemory | None:
    """What the node agent has handed down; without one a rank has memory of its own. None, too,
    where the host refuses: the log says why."""
    if host_experts_gb == 0:
        return None
    fd = inherited_fd
    try:
        if fd < 0:
            fd = create_memory(expert_cache_bytes(host_experts_gb, free_bytes()))
        bytes_max = os.fstat(fd).st_size
    except OSError as error:
        log.warning("no_host_experts", detail=str(error))
        return None
    if host_experts_gb > 0:
        bytes_max = min(bytes_max, int(host_experts_gb * _GB))
    return ExpertCacheMemory(fd=fd, bytes_max=bytes_max)
