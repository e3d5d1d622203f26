"""A process with memory that Mooncake has registered, as a rank has it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.confinement import listeners_of

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-m", "tests.support.exposed_memory")


class BufferProcess:
    def __init__(self, host: str, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [*PROGRAM, "hold_buffer", host],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pid = self._process.pid
        place = self._read()
        self.port = int(place["name"].rpartition(":")[2])
        self.address = int(place["address"])
        self.listeners = listeners_of(self.pid)

    def is_intact(self) -> bool:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return bool(self._read()["intact"])

    def wait(self, timeout_s: float) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        return result
