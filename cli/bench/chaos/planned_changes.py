"""Changes on purpose, by the commands that people use: clients should not notice them."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cli.bench.chaos.processes import ProcessKind
from cli.bench.chaos.site import Site, choose
from shared.errors import Unavailable

_TIMEOUT_S = 180.0

Words = Callable[[Site, str], tuple[str, ...]]


@dataclass(slots=True, kw_only=True)
class PlannedChange:
    """`begin` and `end` make the words of a command, for the rank that was chosen. The change lasts
    until the first command has returned and, after `hold_s`, the second one has."""

    name: str
    summary: str
    begin: Words
    end: Words | None = None
    hold_s: float = 1.0
    target_ms: float | None = None
    _rank: str = ""

    def missing(self, site: Site) -> str | None:
        return None if site.run_dir is not None else "needs an instance of `starfish up`"

    async def inject(self, site: Site, rng: random.Random) -> str:
        (victim,) = choose(rng, site.victims(ProcessKind.RANK), 1)
        self._rank = str(victim.rank)
        words = self.begin(site, self._rank)
        await _run(site.run_dir, words)
        return " ".join(words)

    async def heal(self, site: Site) -> None:
        rank, self._rank = self._rank, ""
        if rank and self.end is not None:
            await _run(site.run_dir, self.end(site, rank))


async def _run(run_dir: Path | None, words: tuple[str, ...]) -> None:
    """Raises Unavailable with the command's own message if it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli", *words, "--run-dir", str(run_dir)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            _, said = await process.communicate()
    except TimeoutError:
        raise Unavailable(f"`starfish {' '.join(words)}` took over {_TIMEOUT_S:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise Unavailable(f"`starfish {' '.join(words)}`: {said.decode(errors='replace').strip()}")
