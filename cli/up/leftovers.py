"""Finds remaining processes of one `starfish up` on this host by its mark in their environment, so
that a quick stop leaves none behind, and harms nobody else's."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

RUN_VARIABLE = "STARFISH_RUN"
_MODULES = {
    *("gpu_worker", "gpu_worker.fork_server", "node_agent", "control_plane"),
    *("gateway", "gateway.standby"),
}


def kill_leftovers(run: str) -> int:
    """Sends SIGKILL to every service process that inherited RUN_VARIABLE=`run`, stopped ones
    included. Returns how many there were."""
    killed = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(int(entry.name))
            try:
                if _is_ours(entry, run):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    killed += 1
            finally:
                os.close(pidfd)
    return killed


def _is_ours(entry: Path, run: str) -> bool:
    if entry.stat().st_uid != os.geteuid():
        return False
    arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
    if not _MODULES & set(arguments[2:3]):
        return False
    return f"{RUN_VARIABLE}={run}".encode() in (entry / "environ").read_bytes().split(b"\0")
