"""`starfish keys`: makes API keys for clients. Only a key's hash is kept; the key itself is shown
once."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from cli.outcome import run_command
from shared.api_key import check_key_name, new_api_key, spelt_hash
from shared.errors import ConfigError
from shared.secret import read_private_file

_BYTES_MAX = 8 << 20

keys = typer.Typer(
    help="API keys of clients: gateways know them by their hashes, from --api-key-file.",
    no_args_is_help=True,
)


@keys.callback()
def _group() -> None:
    """With one command only, typer would leave its name out."""


@keys.command()
def new(
    name: Annotated[str, typer.Argument(help="Who will have it; shows in logs and metrics.")],
    file: Annotated[
        Path | None,
        typer.Option(
            help="Key file to add it to; made if it is not there. Running gateways see it."
        ),
    ] = None,
) -> None:
    """Make an API key and show it once. Limits are added to its entry in the file."""

    async def work() -> int:
        check_key_name(name)
        key = new_api_key()
        entry = key_entry(name, key)
        if file is not None:
            add_entry(file, name, entry)
            print(f"{key}\n\nThis is its only copy: {file} has its hash.")
        else:
            print(f"{key}\n\nThis is its only copy. For the gateways' --api-key-file:\n\n{entry}")
        return 0

    run_command(work())


def key_entry(name: str, key: str) -> str:
    """As TOML."""
    return f'[keys."{name}"]\nhash = "{spelt_hash(key)}"\n'


def add_entry(file: Path, name: str, entry: str) -> None:
    """In one write, so that a gateway never reads a half. Raises ConfigError."""
    known = b""
    if file.exists():
        known = read_private_file(file, flag="--file", bytes_max=_BYTES_MAX)
    try:
        present = tomllib.loads(known.decode()).get("keys", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {file} is not TOML: {error}") from error
    if name in present:
        raise ConfigError(f"--file {file} has a key {name!r}: take its entry out first")
    separator = "" if not known else "\n" if known.endswith(b"\n") else "\n\n"
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with open(fd, "ab", buffering=0) as opened:
            opened.write((separator + entry).encode())
    except OSError as error:
        raise ConfigError(f"--file {file}: {error.strerror}") from error
