"""How much memory a process of this host could allocate now."""

from __future__ import annotations

from pathlib import Path

MEMORY_INFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes(memory_info: Path = MEMORY_INFO, control_group: Path = CONTROL_GROUP) -> int:
    """Free bytes, page cache included, within the limit of our control group. Shared memory is not
    free, though the kernel counts it as cached files."""
    lines = (line.split() for line in memory_info.read_text().splitlines())
    free = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    limit = control_group / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        used = int((control_group / "memory.current").read_text())
        words = (control_group / "memory.stat").read_text().split()
        counts = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        free = min(free, int(text) - used + counts["file"] - counts["shmem"])
    return max(0, free)
