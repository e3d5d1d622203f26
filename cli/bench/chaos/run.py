"""Runs faults one after another under load, and measures each try."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from rich.console import Console

from cli.bench.chaos.faults import Fault
from cli.bench.chaos.load import ChaosLoad
from cli.bench.chaos.options import ChaosOptions
from cli.bench.chaos.processes import ProcessKind
from cli.bench.chaos.report import FaultReport
from cli.bench.chaos.site import Site
from cli.bench.chaos.statistics import (
    Moments,
    TryResult,
    gaps_over_time,
    try_result,
    usual_p99_ms,
)
from cli.bench.fault_observer import POLL_S, SETTLED_S
from cli.bench.stream_client import stream_client
from shared.clock import Clock

SiteOpener = Callable[[], AbstractAsyncContextManager[Site]]

_CALM_AFTER_S = 2.0


async def run_chaos(
    open_site: SiteOpener,
    faults: Sequence[Fault],
    options: ChaosOptions,
    clock: Clock,
    console: Console,
    *,
    may_reopen: bool,
) -> list[FaultReport]:
    """A report of every fault, in order. An instance that does not become whole in time is given
    up; if `may_reopen`, the next fault gets a fresh one. Raises Unavailable if none serves."""
    reports: list[FaultReport] = []
    end_at = clock.now() + options.time_limit_s
    why_not: str | None = None
    while len(reports) < len(faults):
        left = faults[len(reports) :]
        if why_not is not None and not may_reopen:
            return reports + [FaultReport.skipped_fault(fault, why_not) for fault in left]
        if clock.now() >= end_at:
            late = "the time limit has passed"
            return reports + [FaultReport.skipped_fault(fault, late) for fault in left]
        async with open_site() as site:
            why_not = await _run_on(site, left, options, clock, console, end_at, reports)
    return reports


async def _run_on(
    site: Site,
    faults: Sequence[Fault],
    options: ChaosOptions,
    clock: Clock,
    console: Console,
    end_at: float,
    reports: list[FaultReport],
) -> str | None:
    """Appends reports until all faults have one, or the instance is broken: then says why."""
    rng = random.Random(options.seed)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(stream_client(u, clock)) for u in site.urls]
        load = ChaosLoad(
            clients,
            clock,
            streams=options.streams,
            num_prompts=options.num_prompts,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            seed=options.seed,
        )
        await site.observer.wait_until_all_ranks_in_map(options.whole_timeout_s)
        await load.learn()
        census = site.census()
        for fault in faults:
            why = fault.missing(site)
            if why is None and clock.now() >= end_at:
                why = "the time limit has passed"
            if why is not None:
                console.print(f"{fault.name}: left out, {why}", highlight=False)
                reports.append(FaultReport.skipped_fault(fault, why))
                continue
            report = await _run_fault(
                site, fault, load, options, census, rng, clock, console, end_at
            )
            reports.append(report)
            if not report.is_whole:
                return f"the instance was not whole again after {fault.name}"
            await site.observer.wait_until_all_ranks_in_map(options.whole_timeout_s)
    return None


async def _run_fault(
    site: Site,
    fault: Fault,
    load: ChaosLoad,
    options: ChaosOptions,
    census: dict[ProcessKind, int],
    rng: random.Random,
    clock: Clock,
    console: Console,
    end_at: float,
) -> FaultReport:
    console.print(f"{fault.name}: {fault.summary}", highlight=False)
    tried: list[tuple[str, Moments]] = []
    async with load.running():
        for number in range(options.tries):
            if clock.now() >= end_at:
                break
            calm_from = clock.now()
            await asyncio.sleep(options.calm_s)
            victim, moments = await _try(site, fault, options, census, rng, clock, calm_from)
            tried.append((victim, moments))
            result = try_result(victim, moments, load.streams, load.expected, load.ticks)
            console.print(_line(number, options.tries, result), highlight=False)
            if moments.whole_at is None:
                break
    results = tuple(
        try_result(victim, moments, load.streams, load.expected, load.ticks)
        for victim, moments in tried
    )
    return FaultReport(
        name=fault.name,
        summary=fault.summary,
        target_ms=fault.target_ms,
        usual_p99_ms=usual_p99_ms(load.streams, [moments for _, moments in tried]),
        tries=results,
        points=tuple(
            point for _, moments in tried for point in gaps_over_time(load.streams, moments)
        ),
    )


async def _try(
    site: Site,
    fault: Fault,
    options: ChaosOptions,
    census: dict[ProcessKind, int],
    rng: random.Random,
    clock: Clock,
    calm_from: float,
) -> tuple[str, Moments]:
    injected_at = healed_at = clock.now()
    victim = await inject_and_heal(site, fault, rng)
    if fault.hold_s:
        healed_at = clock.now()
    whole_at = await wait_until_whole(site, census, options.whole_timeout_s, clock)
    await asyncio.sleep(_CALM_AFTER_S)
    return victim, Moments(
        calm_from=calm_from,
        injected_at=injected_at,
        healed_at=healed_at,
        whole_at=whole_at,
        until=clock.now(),
    )


async def inject_and_heal(site: Site, fault: Fault, rng: random.Random) -> str:
    """From its begin to its end. Returns whom it hit. Raises OSError, Unavailable."""
    try:
        victim = await fault.inject(site, rng)
        if fault.hold_s:
            await asyncio.sleep(fault.hold_s)
    finally:
        await fault.heal(site)
    return victim


async def wait_until_whole(
    site: Site, census: dict[ProcessKind, int], timeout_s: float, clock: Clock
) -> float | None:
    """The moment since which the instance has been whole, if that lasted for a while; None if it
    did not come in time."""
    since: float | None = None
    give_up_at = clock.now() + timeout_s
    while clock.now() < give_up_at:
        asked_at = clock.now()
        if not await asyncio.to_thread(site.is_whole, census):
            since = None
        elif since is None:
            since = asked_at
        elif asked_at - since >= SETTLED_S:
            return since
        await asyncio.sleep(POLL_S)
    return None


def _line(number: int, tries: int, result: TryResult) -> str:
    longest = max(result.gaps_ms, default=float("nan"))
    back = max(result.return_gaps_ms, default=float("nan"))
    whole = "not whole again" if result.whole_s is None else f"whole after {result.whole_s:.1f} s"
    harm = f"; {result.lost} sessions lost" if result.lost else ""
    error = f" ({result.errors[0]})" if result.errors else ""
    return (
        f"  {number + 1}/{tries} {result.victim}: longest gap {longest:.0f} ms, at the return "
        f"{back:.0f} ms, {whole}{harm}{error}"
    )
