"""The processes of one instance on this host, found by the mark that they inherit. A signal reaches
a process only if it still has the mark: nobody else's is ever harmed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cli.up.leftovers import RUN_VARIABLE


class ProcessKind(Enum):
    RANK = "rank"
    AGENT = "agent"
    CONTROL_PLANE = "control plane"
    GATEWAY = "gateway"
    ETCD = "etcd"


_KINDS = {
    "gpu_worker": ProcessKind.RANK,
    "node_agent": ProcessKind.AGENT,
    "control_plane": ProcessKind.CONTROL_PLANE,
    "gateway": ProcessKind.GATEWAY,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceProcess:
    """`rank` is -1 if it is none. `mark` is its run's, as RUN_VARIABLE has it."""

    pid: int
    kind: ProcessKind
    rank: int
    mark: str

    def __str__(self) -> str:
        name = f"rank {self.rank}" if self.rank >= 0 else self.kind.value
        return f"{name} (pid {self.pid})"


def kind_of(argv: list[str]) -> tuple[ProcessKind, int] | None:
    """The kind of process that a command line starts, and its rank or -1. None for what is no
    service by itself: a fork server before it has become a rank, a standby that has not begun."""
    if argv and Path(argv[0]).name == "etcd":
        return ProcessKind.ETCD, -1
    kind = _KINDS.get(argv[2]) if len(argv) > 2 and argv[1] == "-m" else None
    if kind is not ProcessKind.RANK:
        return None if kind is None else (kind, -1)
    with contextlib.suppress(ValueError, IndexError):
        return kind, int(argv[argv.index("--rank") + 1])
    return None


def processes_of(mark: str, parent: int = 0) -> list[ServiceProcess]:
    """All processes whose mark begins with `mark`, and the etcd that is a child of `parent`."""
    return list(_found(mark, parent))


def _found(mark: str, parent: int) -> Iterator[ServiceProcess]:
    for pid in _own_pids():
        with contextlib.suppress(OSError):
            process = _read(pid, mark, parent)
            if process is not None:
                yield process


def pids_of(mark: str, owner: int) -> Iterator[int]:
    """Of every process whose mark begins with `mark`, of `owner` and of its children: services,
    those that prepare to become one, and their helpers. `mark` is not empty."""
    for pid in _own_pids():
        with contextlib.suppress(OSError):
            entry = Path(f"/proc/{pid}")
            if pid == owner or _mark_of(entry).startswith(mark) or _parent_of(entry) == owner:
                yield pid


def command_of(pid: int) -> list[str]:
    """Its command line. Raises OSError if it has exited."""
    raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    return raw.decode(errors="replace").rstrip("\0").split("\0")


def _own_pids() -> Iterator[int]:
    """Of all processes of this user."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == os.geteuid():
                yield int(entry.name)


def _read(pid: int, mark: str, parent: int) -> ServiceProcess | None:
    """Raises OSError if it has exited."""
    entry = Path(f"/proc/{pid}")
    found = kind_of(command_of(pid))
    if found is None:
        return None
    kind, rank = found
    its_mark = _mark_of(entry)
    is_ours = bool(mark) and its_mark.startswith(mark)
    if kind is ProcessKind.ETCD and not is_ours:
        is_ours = bool(parent) and _parent_of(entry) == parent
    return ServiceProcess(pid=pid, kind=kind, rank=rank, mark=its_mark) if is_ours else None


def _mark_of(entry: Path) -> str:
    prefix = f"{RUN_VARIABLE}=".encode()
    for variable in (entry / "environ").read_bytes().split(b"\0"):
        if variable.startswith(prefix):
            return variable.removeprefix(prefix).decode(errors="replace")
    return ""


def _parent_of(entry: Path) -> int:
    return int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def send(process: ServiceProcess, number: signal.Signals) -> bool:
    """False if the process has exited."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        if _mark_of(Path(f"/proc/{process.pid}")) != process.mark:
            return False
        signal.pidfd_send_signal(pidfd, number)
    except OSError:
        return False
    finally:
        os.close(pidfd)
    return True
