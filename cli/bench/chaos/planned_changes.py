"""Changes on purpose, asked of the admin API as the commands ask it: clients should not notice
them. Asked from this process, because on a small machine the start of a command is a disturbance
by itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cli.admin.client import AdminClient
from cli.admin.goals import Asked, Goal
from cli.bench.chaos.processes import ProcessKind
from cli.bench.chaos.site import Site, choose
from cli.run_dir import read_state
from shared.clock import SystemClock
from shared.errors import Unavailable
from shared.records import RankRecord
from shared.types import RankId

_TIMEOUT_S = 180.0
_POLL_S = 0.25
_PATIENCE_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request of the admin API, `/v1/{name}` with these fields, and when it is done."""

    name: str
    fields: Mapping[str, Any]
    goal: Goal


AskOf = Callable[[Site, RankRecord], Ask]


@dataclass(slots=True, kw_only=True)
class PlannedChange:
    """`begin` and `end` make the requests, for the rank that was chosen. The change lasts until the
    first is done and, after `hold_s`, the second one is."""

    name: str
    summary: str
    begin: AskOf
    end: AskOf | None = None
    hold_s: float = 1.0
    target_ms: float | None = None
    _rank: RankRecord | None = None

    def missing(self, site: Site) -> str | None:
        return None if site.run_dir is not None else "needs an instance of `starfish up`"

    async def inject(self, site: Site, rng: random.Random) -> str:
        (victim,) = choose(rng, site.victims(ProcessKind.RANK), 1)
        members = {record.rank: record for record in site.observer.members()}
        self._rank = members[RankId(victim.rank)]
        ask = self.begin(site, self._rank)
        await _carry_out(site, ask)
        return f"{ask.name} {' '.join(f'{name}={value}' for name, value in ask.fields.items())}"

    async def heal(self, site: Site) -> None:
        rank, self._rank = self._rank, None
        if rank is not None and self.end is not None:
            await _carry_out(site, self.end(site, rank))


async def _carry_out(site: Site, ask: Ask) -> None:
    """Returns when it is done. Raises Refused, and Unavailable if it takes too long or fails."""
    state = None if site.run_dir is None else read_state(site.run_dir)
    if state is None:
        raise Unavailable(f"there is no instance in {site.run_dir}")
    client = AdminClient(state.target(), SystemClock())
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            processes = await client.processes()
            accepted = await client.change(ask.name, ask.fields, patience_s=_PATIENCE_S)
            asked = Asked(accepted=accepted, processes=processes)
            while True:
                status = await client.status()
                if status.change.number >= accepted.change:
                    progress = ask.goal(status, asked)
                    if progress.failed:
                        raise Unavailable(f"{ask.name}: {progress.result}")
                    if not progress.waits_for:
                        return
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise Unavailable(f"{ask.name} took over {_TIMEOUT_S:.0f} s") from None
    finally:
        await client.close()
