"""Faults that are signals to processes, or that take CPU time or disk space away from them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cli.bench.chaos.cpu_limit import CpuLimit, limits_are_possible
from cli.bench.chaos.processes import ProcessKind, ServiceProcess
from cli.bench.chaos.site import Site, choose

_FILL_BYTES = (1 << 20, 4 << 10)

Choice = Callable[[Site, random.Random], list[ServiceProcess]]


@dataclass(slots=True, kw_only=True)
class SignalFault:
    """Sends a signal to the chosen processes. Those that it stops go on after `hold_s`."""

    name: str
    summary: str
    chosen: Choice
    number: signal.Signals = signal.SIGKILL
    hold_s: float = 0.0
    target_ms: float | None = None

    def missing(self, site: Site) -> str | None:
        if self.chosen(site, random.Random(0)):
            return None
        return "the instance has no such process here, or too few of them"

    async def inject(self, site: Site, rng: random.Random) -> str:
        victims = await asyncio.to_thread(self.chosen, site, rng)
        site.send(victims, self.number)
        return ", ".join(map(str, victims))

    async def heal(self, site: Site) -> None:
        site.continue_all()


@dataclass(slots=True, kw_only=True)
class StoreAway:
    """Stops etcd, and kills a rank meanwhile: the death can be judged only when etcd goes on."""

    name: str
    summary: str
    hold_s: float
    target_ms: float | None = None

    def missing(self, site: Site) -> str | None:
        return None if site.processes(ProcessKind.ETCD) else "its etcd is not ours to stop"

    async def inject(self, site: Site, rng: random.Random) -> str:
        victims = choose(rng, site.victims(ProcessKind.RANK), 1)
        site.send(site.processes(ProcessKind.ETCD), signal.SIGSTOP)
        site.send(victims, signal.SIGKILL)
        return ", ".join(map(str, victims))

    async def heal(self, site: Site) -> None:
        site.continue_all()


@dataclass(slots=True, kw_only=True)
class SlowFault:
    """Gives the chosen processes a share of one core's time."""

    name: str
    summary: str
    chosen: Choice
    share: float
    hold_s: float
    target_ms: float | None = None
    _limit: CpuLimit | None = None

    def missing(self, site: Site) -> str | None:
        return limits_are_possible()

    async def inject(self, site: Site, rng: random.Random) -> str:
        victims = await asyncio.to_thread(self.chosen, site, rng)
        self._limit = CpuLimit(self.share)
        self._limit.begin([victim.pid for victim in victims])
        return ", ".join(map(str, victims))

    async def heal(self, site: Site) -> None:
        if self._limit is not None:
            self._limit.end()
            self._limit = None


@dataclass(slots=True, kw_only=True)
class DiskFull:
    """Fills the file system of the run folder, and kills a rank, so that somebody must write."""

    name: str
    summary: str
    hold_s: float
    target_ms: float | None = None
    _filler: Path | None = field(default=None)

    def missing(self, site: Site) -> str | None:
        return (
            None
            if site.folder is not None
            else "needs root and an instance of its own, whose disk nobody else uses"
        )

    async def inject(self, site: Site, rng: random.Random) -> str:
        assert site.folder is not None, "`missing` comes first"
        self._filler = site.folder / "filler"
        await asyncio.to_thread(_fill, self._filler)
        victims = choose(rng, site.victims(ProcessKind.RANK), 1)
        site.send(victims, signal.SIGKILL)
        return f"the run folder is full, {', '.join(map(str, victims))} killed"

    async def heal(self, site: Site) -> None:
        if self._filler is not None:
            self._filler.unlink(missing_ok=True)
            self._filler = None


def _fill(file: Path) -> None:
    """While others write and remove as well: so it takes what there is, in ever smaller parts.
    Raises OSError, except that the disk is full."""
    with file.open("wb", buffering=0) as filler:
        for size in _FILL_BYTES:
            with contextlib.suppress(OSError):
                while filler.write(b"\0" * size):
                    pass
