"""`starfish bench serve`: throughput and latencies at several concurrencies, and the cost of
elasticity compared with a static instance without failure detection."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from cli.bench.drafts import read_drafts
from cli.bench.gateway_cpu import busiest_share, read_gateways_cpu
from cli.bench.loads import ServeLoad
from cli.bench.stats import Spread, percentile
from cli.bench.stream_client import StreamClient, StreamRecord, random_prompts, stream_client
from cli.bench.temporary_instance import temporary_instance_with_progress
from cli.bench.temporary_options import TemporaryInstanceOptions
from cli.client_headers import client_headers
from cli.run_dir import Target
from cli.up.device import count_gpus, plan_device
from shared.clock import Clock
from shared.errors import Unavailable

TOKENS_PER_S = "tokens/s"
ERRORS = "errors"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRow:
    concurrency: int
    tokens_per_s: float
    ttft_ms: Spread
    itl_ms: Spread
    errors: int
    gateway_cpu: float | None = None  # share of a core, of the busiest gateway; None: unknown
    right_drafts: float | None = None  # share of those verified; None: there were none, or unknown


async def measure(
    url: str, load: ServeLoad, clock: Clock, target: Target | None = None
) -> list[ServeRow]:
    """One row per concurrency. No prompt is sent twice, because a cache would have it. `target`
    is the instance, if its ranks can be asked. Raises Unavailable, ConfigError."""
    seeds = itertools.count(int(clock.wall() * 1000))

    def prompts(concurrency: int, rounds: int) -> list[list[int]]:
        return random_prompts(next(seeds), concurrency * rounds, load.prompt_tokens)

    async with stream_client(url, clock) as client:
        await _round(client, load, prompts(2, 1), concurrency=2, clock=clock)  # warm-up
        return [
            await _watched_round(url, client, load, prompts(c, load.rounds), c, clock, target)
            for c in load.concurrencies
        ]


async def _watched_round(
    url: str,
    client: StreamClient,
    load: ServeLoad,
    prompts: Sequence[Sequence[int]],
    concurrency: int,
    clock: Clock,
    target: Target | None,
) -> ServeRow:
    """With what the gateway used meanwhile, and how good drafts were. Both are read outside of what
    is measured."""
    headers = client_headers(os.environ)
    drafts = None if target is None else await read_drafts(target)
    before, began_at = await read_gateways_cpu(url, headers), clock.now()
    row = await _round(client, load, prompts, concurrency=concurrency, clock=clock)
    took_s = clock.now() - began_at
    after = await read_gateways_cpu(url, headers)
    right = None
    if target is not None and drafts is not None:
        right = (await read_drafts(target)).since(drafts)
    return replace(row, gateway_cpu=busiest_share(before, after, took_s), right_drafts=right)


async def _round(
    client: StreamClient,
    load: ServeLoad,
    prompts: Sequence[Sequence[int]],
    *,
    concurrency: int,
    clock: Clock,
) -> ServeRow:
    began_at = clock.now()
    async with asyncio.TaskGroup() as tasks:
        users = [
            tasks.create_task(_user(client, prompts[n::concurrency], load.new_tokens))
            for n in range(concurrency)
        ]
    took_s = clock.now() - began_at
    records = [record for user in users for record in user.result()]
    good = [record for record in records if record.error is None]
    return ServeRow(
        concurrency=concurrency,
        tokens_per_s=sum(len(record.ids) for record in good) / took_s,
        ttft_ms=Spread.of([record.ttft_ms for record in good]),
        itl_ms=Spread.of([gap for record in good for gap in record.gaps_ms()]),
        errors=len(records) - len(good),
    )


async def _user(
    client: StreamClient, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[StreamRecord]:
    return [await client.run(prompt, new_tokens) for prompt in prompts]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRow:
    """Medians over pairs. `overhead` is the fraction by which the elastic instance is worse; None
    for counts."""

    concurrency: int
    quantity: str
    elastic: float
    static: float
    overhead: float | None


async def compare_static(
    load: ServeLoad,
    clock: Clock,
    *,
    pairs: int,
    options: TemporaryInstanceOptions,
    console: Console,
) -> list[ComparedRow]:
    """Measures both instances in turn and swaps their order from pair to pair, so that other work
    on the machine affects both alike. Raises Unavailable, ConfigError."""
    rows: dict[bool, list[ServeRow]] = {False: [], True: []}
    async with _instances(options, console) as open_instance:
        for pair in range(pairs):
            for is_static in (False, True) if pair % 2 == 0 else (True, False):
                async with open_instance(is_static) as target:
                    if target.url is None:
                        raise Unavailable("the instance has no gateway")
                    measured = await measure(target.url, load, clock)
                rows[is_static] += measured
                for row in measured:
                    console.print(
                        f"  pair {pair + 1}/{pairs} {_kind(is_static):8} {_describe_row(row)}",
                        style="dim",
                        soft_wrap=True,
                    )
    return comparison_rows(load.concurrencies, rows[False], rows[True])


OpenInstance = Callable[[bool], AbstractAsyncContextManager[Target]]
"""Opens the static instance (True) or the elastic one (False) while the context lasts."""


@asynccontextmanager
async def _instances(
    options: TemporaryInstanceOptions, console: Console
) -> AsyncIterator[OpenInstance]:
    """Both instances run all the time. But if there are more ranks than GPUs, each is started again
    when its turn comes: ranks of two instances that share a GPU were seen to fail."""

    def start(is_static: bool) -> AbstractAsyncContextManager[Target]:
        own = replace(options, static=is_static)
        return temporary_instance_with_progress(own, console, f"{_kind(is_static)} instance")

    if plan_device(options.device, None, options.ranks, await count_gpus()).mps:
        yield start
        return
    async with start(False) as elastic, start(True) as static:
        yield lambda is_static: nullcontext(static if is_static else elastic)


def _kind(is_static: bool) -> str:
    return "static" if is_static else "elastic"


def _describe_row(row: ServeRow) -> str:
    return (
        f"concurrency {row.concurrency:3}: {row.tokens_per_s:.1f} tokens/s, "
        f"TTFT p50 {row.ttft_ms.p50:.1f} ms, between tokens p50/p99 "
        f"{row.itl_ms.p50:.2f}/{row.itl_ms.p99:.2f} ms, errors {row.errors}"
    )


def comparison_rows(
    concurrencies: Sequence[int], elastic: Sequence[ServeRow], static: Sequence[ServeRow]
) -> list[ComparedRow]:
    """Takes all rows of both instances, in any order."""
    quantities: list[tuple[str, Callable[[ServeRow], float]]] = [
        (TOKENS_PER_S, lambda row: row.tokens_per_s),
        ("TTFT p50 ms", lambda row: row.ttft_ms.p50),
        ("between tokens p50 ms", lambda row: row.itl_ms.p50),
        ("between tokens p99 ms", lambda row: row.itl_ms.p99),
    ]
    rows = []
    for concurrency in concurrencies:
        ours, theirs = (
            [row for row in kind if row.concurrency == concurrency] for kind in (elastic, static)
        )
        for name, of in quantities:
            a, b = (percentile([of(row) for row in kind], 50) for kind in (ours, theirs))
            overhead = 1 - a / b if name == TOKENS_PER_S else a / b - 1
            rows.append(_compared_row(concurrency, name, a, b, overhead))
        a, b = (float(sum(row.errors for row in kind)) for kind in (ours, theirs))
        rows.append(_compared_row(concurrency, ERRORS, a, b, None))
    return rows


def _compared_row(
    concurrency: int, quantity: str, elastic: float, static: float, overhead: float | None
) -> ComparedRow:
    return ComparedRow(
        concurrency=concurrency,
        quantity=quantity,
        elastic=elastic,
        static=static,
        overhead=overhead,
    )


def serve_table(rows: Sequence[ServeRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in (
        *("concurrency", "tokens/s", "TTFT p50 ms", "p99", "max"),
        *("between tokens p50 ms", "p99", "max", "errors", "gateway CPU", "right drafts"),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.concurrency),
            f"{row.tokens_per_s:.1f}",
            *row.ttft_ms.cells(),
            *row.itl_ms.cells(),
            str(row.errors),
            "" if row.gateway_cpu is None else f"{row.gateway_cpu:.0%}",
            "" if row.right_drafts is None else f"{row.right_drafts:.0%}",
        )
    return table


def comparison_table(rows: Sequence[ComparedRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("concurrency", "", "elastic", "static", "overhead"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        digits = 0 if row.overhead is None else 2
        table.add_row(
            str(row.concurrency),
            row.quantity,
            *(f"{value:.{digits}f}" for value in (row.elastic, row.static)),
            "" if row.overhead is None else f"{row.overhead * 100:+.2f} %",
        )
    return table
