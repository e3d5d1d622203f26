"""Outlives a `starfish up` that was killed, just long enough to end processes without a lifeline
(etcd, the MPS daemon) and to remove what the run has created. It runs as a script, so it imports
nothing of this project."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

_GRACE_S = 2.0


def main() -> None:
    """`cleanup_watchdog.py LIFELINE_FD WHAT PID…`: waits for the lifeline's end, then cleans up.
    WHAT goes by descriptor, so that nobody can exchange a folder on the way to it: `PARENT_FD/NAME`
    is a folder to remove, `FOLDER_FD:PART,…` are parts of one that stays, and "-" is nothing."""
    lifeline_fd, what = int(sys.argv[1]), sys.argv[2]
    owner = os.getppid()
    pidfds = [os.pidfd_open(int(pid)) for pid in sys.argv[3:]]
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(lifeline_fd, 1)
    for number, grace_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 0.0)):
        for pidfd in pidfds:
            try:
                signal.pidfd_send_signal(pidfd, number)
            except ProcessLookupError:
                continue
        time.sleep(grace_s)
    if "/" in what:
        parent_fd, _, name = what.partition("/")
        remove(int(parent_fd), [name], f"{name}/lock", owner)
    elif ":" in what:
        folder_fd, _, parts = what.partition(":")
        remove(int(folder_fd), parts.split(","), "lock", owner)


def remove(folder_fd: int, names: list[str], lock: str, owner: int) -> None:
    """Unless the folder belongs to another run already: its lock names the owner."""
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder_fd)
        if int(os.read(fd, 32) or owner) != owner:
            return
    for name in names:
        shutil.rmtree(name, ignore_errors=True, dir_fd=folder_fd)
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder_fd)


if __name__ == "__main__":
    main()
