"""The host memory that holds copies of experts: an anonymous file (memfd) that all processes with a
descriptor share. It disappears with the last descriptor, however its processes ended. Its contents
are not this module's concern."""

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
    """`bytes_max`: how much of it this process uses, counted from the start of the file."""

    fd: int
    bytes_max: int


def expert_cache_bytes(host_experts_gb: float, free_bytes: int) -> int:
    """The size in bytes. `host_experts_gb < 0` means a quarter of `free_bytes`: most stays free for
    the page cache, from which the copies are filled. It is never more than `free_bytes`, because
    the kernel would kill a process for it."""
    if host_experts_gb < 0:
        return free_bytes // _SHARE_OF_FREE
    return min(int(host_experts_gb * _GB), free_bytes)


def create_memory(num_bytes: int) -> int:
    """A descriptor of new memory, all zeros. A page takes memory once it is touched. No process can
    change the size afterwards. Raises OSError."""
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def open_memory_of_process(pid: int, fd: int) -> int:
    """Opens descriptor `fd` of another process. Raises OSError if it is not such memory."""
    ours = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    if not os.readlink(f"/proc/self/fd/{ours}").startswith(_LINK):
        os.close(ours)
        raise OSError(f"descriptor {fd} of process {pid} is not memory for copies of experts")
    return ours


def expert_cache_memory_of_rank(
    inherited_fd: int, host_experts_gb: float
) -> ExpertCacheMemory | None:
    """The memory that the node agent passed on as `inherited_fd`; if that is below 0, new memory.
    None if `host_experts_gb` is 0, or if the host refuses; the log then says why."""
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
