"""What /proc says of a process."""

from __future__ import annotations

from pathlib import Path


def is_running(pid: int) -> bool:
    """False also for one that has ended and that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
