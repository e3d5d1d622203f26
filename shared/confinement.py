"""Keeps a rank's listeners on the data network: the environment in which a rank must be started,
and the rank's own check that it works. Mooncake would listen on every interface, and anybody who
connects can read and overwrite registered memory."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from shared.errors import ConfigError

BIND_VARIABLE = "STARFISH_DATA_BIND"
_SOURCE = Path(__file__).with_name("bind_shim.c")
_LISTEN = "0A"
_WILDCARDS = ("0" * 8, "0" * 32, "0" * 16 + "FFFF0000" + "0" * 8)
_COMPILE_TIMEOUT_S = 60


class Listener(NamedTuple):
    port: int
    inode: int
    is_wildcard: bool


def confined_environment(base_env: Mapping[str, str], data_host: str) -> dict[str, str]:
    """`base_env` plus variables that make a process listen on `data_host` instead of on all
    interfaces. Compiles the shim if this user has none yet. Raises ConfigError."""
    shim = compile_shim(base_env)
    others = [p for p in base_env.get("LD_PRELOAD", "").split(":") if p and p != str(shim)]
    preload = ":".join([str(shim), *others])
    return {**base_env, "LD_PRELOAD": preload, BIND_VARIABLE: _address_of(data_host)}


def require_confined() -> None:
    """Raises ConfigError if this process listens on all interfaces. Call it once every listener is
    open."""
    exposed = [listener.port for listener in listeners_of("self") if listener.is_wildcard]
    if exposed:
        ports = ", ".join(str(port) for port in sorted(exposed))
        raise ConfigError(
            f"port {ports} of this rank listens on all interfaces, where anybody could overwrite "
            "its memory: start ranks by `starfish up` or the node agent, which confine them"
        )


def compile_shim(environ: Mapping[str, str]) -> Path:
    """The shim's shared object in the user's cache, named after a hash of its source. Raises
    ConfigError."""
    source = _SOURCE.read_bytes()
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "starfish"
    target = cache / f"bind_shim-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise ConfigError(
            "no C compiler to build the shim that confines Mooncake's listeners: "
            "run `apt-get install gcc libc6-dev`"
        )
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "shim.so"
            _compile(compiler, built)
            os.replace(built, target)
    except OSError as error:
        raise ConfigError(f"cannot write the bind shim to {cache}: {error.strerror}") from error
    return target


def _compile(compiler: str, target: Path) -> None:
    command = [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-o", str(target), str(_SOURCE)]
    command.append("-ldl")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            f"{compiler} cannot build the bind shim ({last}): run `apt-get install gcc libc6-dev`"
        )


def _address_of(host: str) -> str:
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"the data host {host!r} has no IPv4 address: {error}") from error
    address = str(found[0][4][0])
    if ipaddress.ip_address(address).is_unspecified:
        raise ConfigError(f"the data host must be one address, not {host!r}")
    return address


def listeners_of(pid: int | str) -> list[Listener]:
    """The TCP listeners of a process that this user may inspect."""
    process = Path("/proc") / str(pid)
    inodes = set()
    for descriptor in (process / "fd").iterdir():
        try:
            link = os.readlink(descriptor)
        except FileNotFoundError:
            continue
        if link.startswith("socket:["):
            inodes.add(int(link[len("socket:[") : -1]))
    tables = [process / "net" / name for name in ("tcp", "tcp6")]
    found = [each for t in tables if t.exists() for each in parse_listeners(t.read_text())]
    return [listener for listener in found if listener.inode in inodes]


def parse_listeners(table: str) -> list[Listener]:
    """The listening sockets in the text of /proc/net/tcp or tcp6."""
    result = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        address, _, port = fields[1].partition(":")
        if fields[3] == _LISTEN:
            result.append(Listener(int(port, 16), int(fields[9]), address in _WILDCARDS))
    return result
