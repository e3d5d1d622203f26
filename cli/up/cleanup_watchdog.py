"""Outlives a `starfish up` that was killed, just long enough to end processes without a lifeline
(etcd, the MPS daemon) and to remove the folder of the run. It runs as a script, so it imports
nothing of this project."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time

_GRACE_S = 2.0


def main() -> None:
    """`cleanup_watchdog.py LIFELINE_FD FOLDER PID…`: waits for the lifeline's end, then cleans up.
    FOLDER is `PARENT_FD/NAME`, so that nobody can exchange a folder on the way to it, or "-": then
    none is removed."""
    lifeline_fd, folder = int(sys.argv[1]), sys.argv[2]
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
    if folder != "-":
        parent_fd, _, name = folder.partition("/")
        shutil.rmtree(name, ignore_errors=True, dir_fd=int(parent_fd))


if __name__ == "__main__":
    main()
