"""Memory that two processes of one host map: how a rank makes it, and how a peer opens it.

It has no name in any file system and belongs to nobody but the processes that map it: when they are
gone, killed or not, it is. A peer opens it as a descriptor of the process that made it, which needs
the same host, the same PID namespace and the same user. That it is the right memory shows in its
name, which is long and random: on another host there is nothing of that name."""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat

import numpy as np
from numpy.typing import NDArray

from shared.types import MemoryHandle

_NAME_PREFIX = "starfish-"
_NAME_BYTES = 16
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Nobody who maps the memory can take it away from the others."""


class SharedMemory:
    """`memory` is zero, and readable and writable by all who map it."""

    def __init__(self, nbytes: int) -> None:
        """Raises OSError if the system gives no such memory, or has none left."""
        name = _NAME_PREFIX + secrets.token_hex(_NAME_BYTES)
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Taken now: a page that is missing later would kill whoever touches it.
            os.posix_fallocate(fd, 0, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            self.memory = _map(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.handle = MemoryHandle(pid=os.getpid(), fd=fd, name=name)

    def close(self) -> None:
        """Nobody can open it any more. It is freed with the last view of it, here and there."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_shared_memory(handle: MemoryHandle, nbytes: int) -> NDArray[np.uint8]:
    """The memory that another process has made. Raises OSError if it is not there for this
    process: the other one runs on another host, say, or as another user."""
    link = f"/proc/{handle.pid}/fd/{handle.fd}"
    # Looked at before it is opened: on another host the number may stand for anything.
    _require_name(link, handle.name)
    fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
    try:
        _require_name(f"/proc/self/fd/{fd}", handle.name)
        found = os.fstat(fd)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes or seals & _SEALS != _SEALS:
            raise OSError(f"{handle.name} is not sealed memory of {nbytes} bytes")
        return _map(fd, nbytes)
    finally:
        os.close(fd)


def _require_name(link: str, name: str) -> None:
    if not name.startswith(_NAME_PREFIX) or os.readlink(link) != f"/memfd:{name} (deleted)":
        raise FileNotFoundError(f"{link} is not {name[:64]}")


def _map(fd: int, nbytes: int) -> NDArray[np.uint8]:
    # Populated now, so that no step waits for the first touch of a page.
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    return np.frombuffer(mmap.mmap(fd, nbytes, flags=flags), dtype=np.uint8)
