"""Finds remaining processes of one instance on this host by their command lines, so that a quick
stop leaves none behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from pathlib import Path

_MODULES = {"gpu_worker", "gpu_worker.fork_server", "node_agent", "control_plane", "gateway"}


def kill_leftovers(etcd: str, instance: str) -> int:
    """Sends SIGKILL to every process of this user's that names this etcd and instance, stopped ones
    included. Returns how many there were."""
    killed = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(int(entry.name))
            try:
                if _is_ours(entry, etcd, instance):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    killed += 1
            finally:
                os.close(pidfd)
    return killed


def _is_ours(entry: Path, etcd: str, instance: str) -> bool:
    if entry.stat().st_uid != os.geteuid():
        return False
    arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
    if not _MODULES & set(arguments[2:3]):
        return False
    flags = dict(itertools.pairwise(arguments))
    return flags.get("--etcd") == etcd and flags.get("--instance") == instance
