"""Reads the API keys from a file and the environment, and again whenever the file has changed. A
file that cannot be used changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import structlog

from gateway.api_keys import NO_KEYS, KeySet, joined, parse_environment, parse_keys
from shared.errors import ConfigError
from shared.secret import read_private_file

log = structlog.get_logger()

ENVIRONMENT = "STARFISH_API_KEYS"
RELOAD_POLL_S = 1.0
_BYTES_MAX = 8 << 20
_FLAG = "--api-key-file"


class ApiKeyWatch:
    """Raises ConfigError if the keys cannot be read at the start. `keys` are the present ones."""

    def __init__(
        self, file: Path | None, environment: str, *, poll_s: float = RELOAD_POLL_S
    ) -> None:
        self._file = file
        self._poll_s = poll_s
        self._from_environment = _named(ENVIRONMENT, environment)
        self._content = b""
        self._told = ""
        self._wake = asyncio.Event()
        self.keys: KeySet = self._from_environment
        if file is not None:
            self._content = self._read(file)
            self.keys = self._parse(self._content)

    def reload_now(self) -> None:
        """Does not wait for the next poll."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Compares contents: a file may be written twice within the grain of its
        time."""
        file = self._file
        while file is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()
            self._wake.clear()
            try:
                content = await asyncio.to_thread(self._read, file)
                if content != self._content:
                    self.keys = self._parse(content)
                    self._content = content
                    log.info("api_keys_read", keys=len(self.keys))
                self._told = ""
            except ConfigError as error:
                if str(error) != self._told:
                    self._told = str(error)
                    log.error("api_keys_unusable", detail=self._told, kept=len(self.keys))

    def _read(self, file: Path) -> bytes:
        content = read_private_file(file, flag=_FLAG, bytes_max=_BYTES_MAX + 1)
        if len(content) > _BYTES_MAX:
            raise ConfigError(f"{_FLAG} {file} is larger than {_BYTES_MAX} bytes")
        return content

    def _parse(self, content: bytes) -> KeySet:
        try:
            return joined(parse_keys(content.decode()), self._from_environment)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{_FLAG} {self._file} is not UTF-8") from error
        except ConfigError as error:
            raise ConfigError(f"{_FLAG} {self._file}: {error}") from error


def _named(variable: str, text: str) -> KeySet:
    if not text.strip():
        return NO_KEYS
    try:
        return parse_environment(text)
    except ConfigError as error:
        raise ConfigError(f"environment: {variable}: {error}") from error
