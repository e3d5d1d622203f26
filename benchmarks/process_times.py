"""What the processes below this one have used of the machine's cores, and how long they waited for
one: by what they are, from the kernel's scheduler."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

HOSTILE = "hostile client"
MEASURING = "measuring client"
_KINDS = {
    "gateway": "gateway",
    "gpu_worker": "ranks",
    "benchmarks.hostile_client": HOSTILE,
    "shared.grammars.worker": "grammars",
}
"""Python's module → what it is called. All others are "rest"."""


class CpuTimes(NamedTuple):
    """Seconds, of all threads. `waited_s` on a run queue: ready, but another had the core."""

    used_s: float
    waited_s: float


def cpu_times() -> Mapping[str, CpuTimes]:
    """Of this process and of all below it, since each began. Threads that have ended count no
    more."""
    totals: dict[str, CpuTimes] = defaultdict(lambda: CpuTimes(0.0, 0.0))
    for pid in _descendants():
        with contextlib.suppress(OSError):
            name = _kind_of(pid)
            used, waited = _times_of(pid)
            totals[name] = CpuTimes(totals[name].used_s + used, totals[name].waited_s + waited)
    return totals


def difference(
    before: Mapping[str, CpuTimes], after: Mapping[str, CpuTimes]
) -> Mapping[str, CpuTimes]:
    nothing = CpuTimes(0.0, 0.0)
    return {
        kind: CpuTimes(
            times.used_s - before.get(kind, nothing).used_s,
            times.waited_s - before.get(kind, nothing).waited_s,
        )
        for kind, times in after.items()
    }


def _descendants() -> list[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                children[_parent_of(entry)].append(int(entry.name))
    found = [os.getpid()]
    for pid in found:
        found += children[pid]
    return found


def _parent_of(entry: Path) -> int:
    return int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def _kind_of(pid: int) -> str:
    """Raises OSError if it has ended."""
    if pid == os.getpid():
        return MEASURING
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return _KINDS.get(module, "rest")


def _times_of(pid: int) -> CpuTimes:
    used = waited = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            fields = thread.read_text().split()
            used += int(fields[0])
            waited += int(fields[1])
    return CpuTimes(used / 1e9, waited / 1e9)
