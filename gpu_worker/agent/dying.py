"""Whether a process has begun to die. Its pidfd tells only when it is gone, and the kernel takes a
process with a CUDA context apart for 100 ms and more; that it will not come back is known at once.
"""

from __future__ import annotations

import signal

_EXITING = 0x4  # PF_EXITING of the kernel's per-task flags
_KILLED = 1 << (signal.SIGKILL - 1)
# Fields of /proc/PID/stat, counted from the one after the command's closing bracket.
_STATE, _FLAGS, _PENDING = 0, 6, 28


def is_dying(pid: int) -> bool:
    """Of a process that the caller can still name by its pid: a child not yet waited for, or one
    whose pidfd shows no exit. Never true of one that may go on, such as a stopped one."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    if fields[_STATE] in (b"Z", b"X"):
        return True
    return bool(int(fields[_FLAGS]) & _EXITING or int(fields[_PENDING]) & _KILLED)
