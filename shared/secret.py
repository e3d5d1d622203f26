"""Files with secrets: the one that the processes of an instance share, and passwords and keys. Only
their user reads them; what they hold is never an argument, and never logged."""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
from pathlib import Path

from shared.errors import ConfigError

CHARACTERS_MIN = 32
_BYTES_MAX = 4096
_OTHERS = stat.S_IRWXO | stat.S_IWGRP


def create_secret(path: Path) -> None:
    """Replaces a file of an earlier run. Raises OSError."""
    write_private_file(path, secrets.token_hex(32).encode() + b"\n")


def require_secret(address: str, path: Path | None) -> None:
    """Raises ConfigError if other hosts could reach a control port at this address and be let in
    without a secret."""
    if path is None and not is_loopback(address):
        raise ConfigError(
            f"--control-host {address} can be reached from other hosts: pass --secret-file to "
            "every process of the instance"
        )


def is_loopback(address: str) -> bool:
    """Whether only this host reaches it."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def read_secret(path: Path | None) -> bytes:
    """Empty without a file. Raises ConfigError if it cannot be read, is too short, or if anybody
    but its user and group can read it or anybody but its user can write it."""
    if path is None:
        return b""
    secret = read_private_file(path, flag="--secret-file")
    if len(secret) < CHARACTERS_MIN:
        raise ConfigError(
            f"--secret-file {path}: a secret has at least {CHARACTERS_MIN} characters; make one "
            "with `openssl rand -hex 32`"
        )
    return secret


def read_private_file(path: Path, *, flag: str, bytes_max: int = _BYTES_MAX) -> bytes:
    """The first `bytes_max` bytes, without white space around them. Raises ConfigError, which names
    the `flag`, if it cannot be read, or if anybody but its user and group can read it or anybody
    but its user can write it."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(bytes_max).strip()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from error
    if mode & _OTHERS:
        raise ConfigError(f"{flag} {path} is open to other users; run chmod 600 on it")
    return content


def write_private_file(path: Path, content: bytes) -> None:
    """Replaces an earlier one, readable by this user alone. Raises OSError."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
