"""Where the time of a rank's start goes: a log line for each stage, with the process's age."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from shared.clock import Clock

log = structlog.get_logger()

_START_TIME = 19
"""In /proc/self/stat, counted from the field after the command's closing bracket; clock ticks since
the boot. A fork starts a process as well."""


class StartupTimer:
    """Begins with the first stage: what came before `main`, which is the interpreter and the
    imports, or next to nothing in a forked process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_at = self._ended_at = clock.now() - process_age_s()
        self.end_stage("imports")

    def end_stage(self, stage: str) -> None:
        now = self._clock.now()
        took_s, age_s = now - self._ended_at, now - self._started_at
        self._ended_at = now
        log.info("startup_stage", stage=stage, took_s=round(took_s, 3), age_s=round(age_s, 3))


def process_age_s() -> float:
    """To 10 ms."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    uptime_s = float(Path("/proc/uptime").read_bytes().split()[0])
    return max(0.0, uptime_s - int(fields[_START_TIME]) / os.sysconf("SC_CLK_TCK"))
