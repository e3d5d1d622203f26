"""Which process of this host listens on a port, as far as /proc shows it to this user."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LISTEN = "0A"
_COMMAND_CHARS_MAX = 120


def holder_of(port: int, proc: Path = Path("/proc")) -> str | None:
    """Its pid and command line; of several, the one that has run for longest."""
    wanted = {f"socket:[{inode}]" for inode in _listening_inodes(port, proc)}
    if not wanted:
        return None
    for pid in sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdigit()):
        with contextlib.suppress(OSError):
            if any(_link(fd) in wanted for fd in (proc / str(pid) / "fd").iterdir()):
                command = (proc / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ")
                return f"pid {pid}: {command.decode(errors='replace').strip()[:_COMMAND_CHARS_MAX]}"
    return None


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _listening_inodes(port: int, proc: Path) -> set[str]:
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found
