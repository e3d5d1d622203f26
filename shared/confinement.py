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
from shared.private_folder import cache_folder, is_own_file, prepare_cache

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
    interfaces. Compiles the shim if there is none yet. Raises ConfigError."""
    shim = find_shim(base_env)
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


def find_shim(environ: Mapping[str, str]) -> Path:
    """The shim's shared object, named after a hash of its source: the one that was built beside the
    source (as in an image), else the one in the user's cache, which is compiled if
    necessary. Code of a rank's process, so one that another user could have written is never taken.
    Raises ConfigError."""
    name = shim_name()
    built = _SOURCE.with_name(name)
    if built.exists():
        if not is_own_file(built):
            raise ConfigError(
                f"{built} is code that other users can change: run `chmod go-w {built}` as its "
                "owner, or remove it"
            )
        return built
    cache = cache_folder(environ)
    prepare_cache(cache)
    target = cache / name
    if not (target.exists() and is_own_file(target)):
        _build_shim(target)
    return target


def build_shim_beside_source() -> None:
    """For an image or a package: whoever runs from it needs no compiler. Raises ConfigError."""
    _build_shim(_SOURCE.with_name(shim_name()))


def shim_name() -> str:
    return f"bind_shim-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]}.so"


def _build_shim(target: Path) -> None:
    """Compiles the shim, which only the owner may change. Raises ConfigError."""
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise ConfigError(
            "no C compiler to build the shim that confines Mooncake's listeners: "
            "run `apt-get install gcc libc6-dev`"
        )
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / "shim.so"
            _compile(compiler, built)
            built.chmod(0o555)
            os.replace(built, target)
    except OSError as error:
        raise ConfigError(f"cannot write the bind shim to {target}: {error.strerror}") from error


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


def require_internal(data_host: str) -> None:
    """Raises ConfigError if the address is one that the Internet routes to: whoever reaches the
    data network reads and overwrites the memory of ranks."""
    address = _address_of(data_host)
    if ipaddress.ip_address(address).is_global:
        raise ConfigError(
            f"the data address {address} is a public one, and whoever reaches it can read and "
            "overwrite a rank's memory: pass --data-host with an address of an internal network, "
            "or, if a firewall lets only the instance's hosts in, --public-data-host"
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


if __name__ == "__main__":
    build_shim_beside_source()
