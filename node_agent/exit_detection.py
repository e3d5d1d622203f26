"""Whether a process has begun to exit. Its pidfd fires only when it is gone, and the kernel needs
100 ms or more to tear down a process with a CUDA context or much memory. That the process can only
end is known at once.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

_EXITING = 0x4  # PF_EXITING of the kernel's per-task flags
_KILLED = 1 << (signal.SIGKILL - 1)
# Fields of /proc/PID/stat, counted from the one after the command's closing bracket.
_STATE, _FLAGS, _PENDING, _EXIT_STATUS = 0, 6, 28, 49
_STAT_BYTES_MAX = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Dying:
    """`exit_code` as in `subprocess`; None if the kernel does not report it yet."""

    exit_code: int | None


class StatFile:
    """/proc/PID/stat, kept open: reading it again costs a third of opening it, and it never refers
    to another process that gets the same pid."""

    def __init__(self, pid: int) -> None:
        """Raises OSError if there is no such process."""
        self._fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    def read_dying(self) -> Dying | None:
        """None if the process may continue, for example if it is stopped."""
        try:
            return parse_dying(os.pread(self._fd, _STAT_BYTES_MAX, 0))
        except ProcessLookupError:
            return Dying(exit_code=None)

    def close(self) -> None:
        os.close(self._fd)


def parse_dying(stat: bytes) -> Dying | None:
    """Reads one line of /proc/PID/stat."""
    fields = stat.rpartition(b")")[2].split()
    if fields[_STATE] in (b"Z", b"X") or int(fields[_FLAGS]) & _EXITING:
        return Dying(exit_code=_exit_code(int(fields[_EXIT_STATUS])))
    if int(fields[_PENDING]) & _KILLED:
        return Dying(exit_code=-signal.SIGKILL)
    return None


def _exit_code(status: int) -> int | None:
    """Exit code of a wait status. The field is 0 until the kernel writes it, so 0 means None."""
    killed_by = status & 0x7F
    return -killed_by if killed_by else status >> 8 or None
