"""What an instance uses of its host at one moment, read from /proc, its run folder and etcd."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cli.bench.chaos.processes import command_of, pids_of
from cli.bench.soak.growth import Quantity
from shared.keys import Keys
from shared.store import Store

_SHARED_FILES = ("/memfd:", "/dev/shm/")
_KB = 1024
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Life:
    """One life of one process: a pid may come again, and a standby becomes something else."""

    pid: int
    started: int  # ticks since the boot
    role: str

    def __str__(self) -> str:
        return f"{self.role} (pid {self.pid})"


Usage = dict[Quantity, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """`at` is `Clock.now()`. `is_whole`: nothing was missing, so that the sums can be compared."""

    at: float
    is_whole: bool
    processes: dict[Life, Usage]
    instance: Usage


def read_processes(mark: str, owner: int) -> dict[Life, Usage]:
    """Of all processes of an instance (`processes_of`), its helpers and `owner` included."""
    found = {}
    for pid in pids_of(mark, owner):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has exited meanwhile
            life, usage = _read_process(pid)
            found[life] = usage
    return found


def _read_process(pid: int) -> tuple[Life, Usage]:
    """Raises OSError, and ValueError or IndexError for one that is exiting."""
    entry = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
    started = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
    opened = list(_opened(entry / "fd"))
    usage: Usage = {
        Quantity.MEMORY: float(_kilobytes(status["RssAnon"])),
        Quantity.DESCRIPTORS: float(len(opened)),
        Quantity.SOCKETS: float(sum(each.startswith("socket:") for each in opened)),
        Quantity.THREADS: float(status["Threads"]),
    }
    return Life(pid, started, role_of(command_of(pid))), usage


def _opened(folder: Path) -> Iterator[str]:
    """What each descriptor is."""
    for fd in folder.iterdir():
        with contextlib.suppress(OSError):
            yield os.readlink(fd)


def _kilobytes(field: str) -> int:
    return int(field.split()[0]) * _KB


def role_of(argv: list[str]) -> str:
    """The module that a command line runs, or its program's name."""
    if len(argv) > 2 and argv[1] == "-m":
        return argv[2]
    return Path(argv[0]).name


def shared_memory_bytes(lives: Iterable[Life]) -> float:
    """The sizes of all files in memory that these processes map, each counted once."""
    sizes: dict[tuple[str, str], int] = {}
    for life in lives:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{life.pid}/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(_SHARED_FILES):
                    start, _, end = fields[0].partition("-")
                    upto = int(fields[2], 16) + int(end, 16) - int(start, 16)
                    key = (fields[3], fields[4])
                    sizes[key] = max(sizes.get(key, 0), upto)
    return float(sum(sizes.values()))


def folder_usage(run_dir: Path) -> Usage:
    """Bytes that the files of a run folder take, logs and etcd's data apart. etcd's write-ahead log
    is left out: it comes and goes in parts of 64 MB, of which etcd keeps five."""
    usage: Usage = {Quantity.LOGS: 0.0, Quantity.ETCD_DATA: 0.0, Quantity.RUN_FOLDER: 0.0}
    for folder, _, names in os.walk(run_dir):
        parts = Path(folder).relative_to(run_dir).parts
        for name in names if parts[-1:] != ("wal",) else ():
            with contextlib.suppress(OSError):
                size = (Path(folder) / name).lstat().st_blocks * _BLOCK
                usage[_kind_of_file(parts, name)] += size
    return usage


def _kind_of_file(folder: tuple[str, ...], name: str) -> Quantity:
    if folder[:1] == ("logs",) or ".log" in name:
        return Quantity.LOGS
    return Quantity.ETCD_DATA if folder[:2] == ("etcd", "data") else Quantity.RUN_FOLDER


async def count_keys(store: Store, keys: Keys) -> Usage:
    """Verdicts are apart: each of them stays for minutes. Raises StoreUnavailable."""
    values = (await store.get_prefix(keys.root)).values
    verdicts = sum(value.key.startswith(keys.verdicts) for value in values)
    return {
        Quantity.ETCD_KEYS: float(len(values) - verdicts),
        Quantity.ETCD_VERDICTS: float(verdicts),
    }
