"""Runs a soak: the load, a fault every few seconds, and samples of what the instance uses."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from rich.console import Console

from cli.bench.chaos.faults import Fault
from cli.bench.chaos.processes import ProcessKind
from cli.bench.chaos.run import inject_and_heal, wait_until_whole
from cli.bench.chaos.site import Site
from cli.bench.soak.growth import Quantity
from cli.bench.soak.load import SoakLoad
from cli.bench.soak.options import SoakOptions
from cli.bench.soak.report import FaultCount, SoakReport, progress_line
from cli.bench.soak.requests import soak_requests
from cli.bench.soak.resource_history import ResourceHistory
from cli.bench.soak.resources import (
    Sample,
    count_keys,
    folder_usage,
    read_processes,
    shared_memory_bytes,
)
from cli.bench.stream_client import stream_client
from cli.run_dir import read_state
from shared.clock import Clock
from shared.errors import StoreUnavailable, Unavailable
from shared.etcd_store import EtcdStore, connect_store
from shared.keys import Keys

UP_FLAGS = ("--log-mb-max", "0.25", "--kv-tokens", "6144")
"""So small that logs and KV caches are full within the warm-up: what has a bound must not look like
growth until it gets there."""

_PROGRESS_S = 60.0
_SPARED = frozenset({0})
"""Rank 0 lives from one rolling restart to the next: in short lives no slow growth shows."""


async def run_soak(
    site: Site,
    faults: Sequence[Fault],
    options: SoakOptions,
    clock: Clock,
    console: Console,
) -> SoakReport:
    """`site` is of `starfish up`. Ends early if the instance does not become whole again. Raises
    Unavailable if it does not serve at all."""
    site.spared = _SPARED
    requests = soak_requests(options.seed, options.new_tokens, options.long_tokens)
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(stream_client(u, clock)) for u in site.urls]
        load = SoakLoad(gateways, requests, clients=options.clients, seed=options.seed)
        await site.observer.wait_until_all_ranks_in_map(options.whole_timeout_s)
        possible = _possible(site, faults, console)
        await load.learn()
        began_at = clock.now()
        history = ResourceHistory(began_at, options.warm_up_s)
        counts: dict[str, FaultCount] = {}
        sampler = await stack.enter_async_context(_sampler(site, clock))
        census = site.census()
        progress = _report_progress(console, clock, began_at, load, history, counts)
        async with load.running(), asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(sampler.run(history, census, options.sample_s)),
                tasks.create_task(progress),
            ]
            why_not = await _inject(site, possible, options, census, clock, console, counts)
            for task in background:
                task.cancel()
    return SoakReport(
        minutes=(clock.now() - began_at) / 60.0,
        load={kind.value: count for kind, count in load.counts.items()},
        faults=counts,
        lives=tuple(history.lives()),
        sums=tuple(history.sums()),
        ended_early=why_not,
    )


def _possible(site: Site, faults: Sequence[Fault], console: Console) -> list[Fault]:
    """Raises Unavailable if none is."""
    reasons = {fault.name: fault.missing(site) for fault in faults}
    left_out = [f"{name} ({reason})" for name, reason in reasons.items() if reason is not None]
    if left_out:
        console.print(f"left out: {', '.join(left_out)}", highlight=False, soft_wrap=True)
    found = [fault for fault in faults if reasons[fault.name] is None]
    if not found:
        raise Unavailable("none of these faults is possible here; pass other --faults")
    return found


async def _inject(
    site: Site,
    faults: Sequence[Fault],
    options: SoakOptions,
    census: dict[ProcessKind, int],
    clock: Clock,
    console: Console,
    counts: dict[str, FaultCount],
) -> str | None:
    """Faults until the time is over. Returns why that was too early, if it was."""
    rng = random.Random(options.seed)
    ends_at = clock.now() + options.minutes * 60.0
    for fault in _in_rounds(faults, rng):
        next_at = clock.now() + options.every_s
        if next_at > ends_at:
            await asyncio.sleep(max(0.0, ends_at - clock.now()))
            return None
        count = counts.setdefault(fault.name, FaultCount())
        began_at = clock.now()
        try:
            victim = await inject_and_heal(site, fault, rng)
        except (Unavailable, OSError) as error:
            count.failed.append(str(error))
            victim = f"{fault.name} failed"
            console.print(f"{fault.name}: {error}", highlight=False, soft_wrap=True)
        whole_at = await wait_until_whole(site, census, options.whole_timeout_s, clock)
        if whole_at is None:
            return f"the instance was not whole again after {fault.name} ({victim})"
        count.whole_s.append(whole_at - began_at)
        await asyncio.sleep(max(0.0, next_at - clock.now()))
    return None


def _in_rounds(faults: Sequence[Fault], rng: random.Random) -> Iterator[Fault]:
    """Every fault once, in some order, again and again."""
    while True:
        yield from rng.sample(faults, len(faults))


async def _report_progress(
    console: Console,
    clock: Clock,
    began_at: float,
    load: SoakLoad,
    history: ResourceHistory,
    counts: dict[str, FaultCount],
) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_S)
        if history.last is not None:
            line = progress_line(clock.now() - began_at, load.counts, counts, history.last)
            console.print(line, highlight=False, soft_wrap=True)


class _Sampler:
    """Keeps the last known counts of etcd while it is away."""

    def __init__(self, site: Site, store: EtcdStore, keys: Keys, clock: Clock) -> None:
        self._site, self._store, self._keys, self._clock = site, store, keys, clock
        self._counted: dict[Quantity, float] = {}

    async def run(
        self, history: ResourceHistory, census: dict[ProcessKind, int], every_s: float
    ) -> None:
        while True:
            history.add(await self._sample(census))
            await asyncio.sleep(every_s)

    async def _sample(self, census: dict[ProcessKind, int]) -> Sample:
        site = self._site
        try:
            self._counted = await count_keys(self._store, self._keys)
            has_counted = True
        except StoreUnavailable:
            has_counted = False
        whole = has_counted and await asyncio.to_thread(site.is_whole, census)
        processes = await asyncio.to_thread(read_processes, site.mark, site.owner)
        usage = dict(self._counted)
        if site.run_dir is not None:
            usage |= await asyncio.to_thread(folder_usage, site.run_dir)
        usage[Quantity.SHARED_MEMORY] = await asyncio.to_thread(
            shared_memory_bytes, list(processes)
        )
        return Sample(at=self._clock.now(), is_whole=whole, processes=processes, instance=usage)


@asynccontextmanager
async def _sampler(site: Site, clock: Clock) -> AsyncIterator[_Sampler]:
    """Raises StoreUnavailable."""
    state = None if site.run_dir is None else read_state(site.run_dir)
    assert state is not None, "`starfish up` runs the instance"
    target = state.target()
    store = await connect_store(target.store)
    try:
        yield _Sampler(site, store, Keys(target.instance), clock)
    finally:
        await store.close()
