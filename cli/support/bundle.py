"""Writes a bundle: every content goes through the redactor, and what could not be had is named."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cli.support.redaction import Redactor
from shared.clock import SystemClock
from shared.errors import ConfigError

CONTENTS = "contents.json"


@contextmanager
def open_bundle(path: Path, redactor: Redactor) -> Iterator[Bundle]:
    """The file is this user's alone. Raises ConfigError if it is there already, or cannot be
    written."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        file = os.fdopen(os.open(path, flags, 0o600), "wb")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    with file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        bundle = Bundle(tar, path.name.removesuffix(".tar.gz"), redactor)
        yield bundle
        bundle.add_contents()


class Bundle:
    def __init__(self, tar: tarfile.TarFile, folder: str, redactor: Redactor) -> None:
        """`folder` is that of all files in it."""
        self._tar = tar
        self._folder = folder
        self._redactor = redactor
        self._written: dict[str, int] = {}
        self._failed: dict[str, str] = {}

    @property
    def missing(self) -> list[str]:
        return sorted(self._failed)

    def add(self, name: str, content: bytes) -> None:
        cleaned = self._redactor.clean(content)
        entry = tarfile.TarInfo(f"{self._folder}/{name}")
        entry.size, entry.mtime, entry.mode = len(cleaned), int(SystemClock().wall()), 0o600
        self._tar.addfile(entry, io.BytesIO(cleaned))
        self._written[name] = len(cleaned)

    def add_json(self, name: str, value: Any) -> None:
        self.add(name, json.dumps(value, indent=2, default=str).encode() + b"\n")

    def add_missing(self, name: str, reason: BaseException | str) -> None:
        """It belongs in, and could not be had."""
        self._failed[name] = str(reason) or type(reason).__name__

    def add_contents(self) -> None:
        """What is in it, and what is missing."""
        self.add_json(CONTENTS, {"bytes": dict(self._written), "missing": dict(self._failed)})

    def try_add(self, name: str, read: Callable[[], Any]) -> None:
        """What `read` returns, as JSON, or that it failed."""
        try:
            self.add_json(name, read())
        except OSError as error:
            self.add_missing(name, error)
