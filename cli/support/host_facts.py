"""Facts about this host and this installation. Nothing here fails: what is not there is left
out."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from shared.version import starfish_version

_COMMAND_TIMEOUT_S = 10.0
_FILES = (
    *("/etc/os-release", "/proc/version", "/proc/cmdline", "/proc/cpuinfo", "/proc/meminfo"),
    *("/proc/loadavg", "/proc/pressure/cpu", "/proc/pressure/memory", "/proc/pressure/io"),
    *("/proc/self/limits", "/proc/net/dev", "/proc/net/sockstat", "/proc/self/cgroup"),
    *("/proc/driver/nvidia/version", "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/memory.max"),
    *("/proc/sys/net/core/somaxconn", "/proc/sys/vm/overcommit_memory", "/proc/sys/vm/swappiness"),
    "/sys/kernel/mm/transparent_hugepage/enabled",
)
_COMMANDS = (
    ("nvidia-smi", "-q"),
    ("nvidia-smi", "topo", "-m"),
    ("ibv_devinfo",),
    ("ip", "-brief", "address"),
    ("df", "-h"),
)
_VARIABLES = ("CUDA_", "NCCL_", "MC_", "OMP_", "OTEL_", "TORCH_", "NUMBA_", "PYTHON", "STARFISH_")
"""Beginnings of the names of variables whose values matter."""


def versions() -> dict[str, str]:
    """Of Starfish, of Python and of every package that is installed."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "starfish": starfish_version(),
        "python": sys.version,
        "platform": platform.platform(),
        **dict(sorted(installed.items())),
    }


def host_files() -> Iterator[tuple[str, bytes]]:
    """(name in the bundle, content)"""
    for path in map(Path, _FILES):
        try:
            yield f"host/{str(path).strip('/').replace('/', '_')}", path.read_bytes()
        except OSError:
            continue
    for command in _COMMANDS:
        if shutil.which(command[0]) is not None:
            yield f"host/{'_'.join(command)}.txt", _output(*command)


def _output(*command: str) -> bytes:
    try:
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error).encode()
    return result.stdout


def processes_of(instance: str) -> list[dict[str, object]]:
    """The processes of an instance on this host that we may look at: their command lines, which
    hold their configuration, and what they use."""
    found = []
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            line = (entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
            arguments = line.split("\0")
            if not _is_of(instance, arguments):
                continue
            found.append(
                {
                    "pid": int(entry.name),
                    "command": arguments,
                    "environment": _environment(entry),
                    "status": _status(entry),
                    "descriptors": len(os.listdir(entry / "fd")),
                }
            )
        except OSError:
            continue
    return found


def _is_of(instance: str, arguments: list[str]) -> bool:
    pairs = itertools.pairwise(arguments)
    return ("--instance", instance) in pairs or f"--instance={instance}" in arguments


def _environment(process: Path) -> dict[str, str]:
    """What matters of it."""
    lines = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    pairs = (line.partition("=") for line in lines)
    return {name: value for name, _, value in pairs if name.startswith(_VARIABLES)}


def _status(process: Path) -> dict[str, str]:
    lines = (line.partition(":") for line in (process / "status").read_text().splitlines())
    wanted = ("Name", "State", "PPid", "VmPeak", "VmRSS", "Threads", "Cpus_allowed_list")
    return {name: value.strip() for name, _, value in lines if name in wanted}
