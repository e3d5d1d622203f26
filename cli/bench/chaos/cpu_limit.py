"""Less CPU time for some processes, by a control group (version 1 or 2) that exists meanwhile."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

_ROOTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
_PERIOD_US = 20_000
"""Short, so that a process that has used up its share waits for less than this."""


def limits_are_possible() -> str | None:
    """None if they are, else why they are not."""
    return None if _root() is not None else "needs root and a control group of CPU time"


class CpuLimit:
    """`share` is a fraction of one core, for all processes together."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._group: Path | None = None
        self._home: dict[int, Path] = {}

    def begin(self, pids: Sequence[int]) -> None:
        """Raises OSError."""
        root = _root()
        assert root is not None, "`limits_are_possible` comes first"
        self._group = root / f"starfish-chaos-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._group.mkdir()
        quota_us = max(1000, int(self._share * _PERIOD_US))
        if (self._group / "cpu.max").exists():
            (self._group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
        else:
            (self._group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (self._group / "cpu.cfs_quota_us").write_text(str(quota_us))
        for pid in pids:
            self._home[pid] = root / _group_of(pid).lstrip("/")
            (self._group / "cgroup.procs").write_text(str(pid))

    def end(self) -> None:
        """Everything goes back to where it was. Idempotent."""
        if self._group is None:
            return
        for pid in (self._group / "cgroup.procs").read_text().split():
            home = self._home.get(int(pid), self._group.parent)
            with contextlib.suppress(OSError):  # it has just exited
                (home / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):
            self._group.rmdir()
        self._group = None


def _root() -> Path | None:
    for root in _ROOTS:
        controllers = root / "cgroup.subtree_control"
        has_cpu = (root / "cpu.cfs_quota_us").exists() or (
            controllers.exists() and "cpu" in controllers.read_text().split()
        )
        if has_cpu and os.access(root, os.W_OK):
            return root
    return None


def _group_of(pid: int) -> str:
    """Its control group of CPU time, as a path below the root."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(",") or not controllers:
            return path
    return "/"
