"""`starfish bench serve`: throughput and latencies at several concurrencies, and what elasticity
costs against a static instance without detection."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from cli.bench.own_instance import own_instance
from cli.bench.stats import Spread, percentile
from cli.bench.stream_client import StreamClient, StreamRecord, random_prompts, stream_client
from shared.clock import Clock
from shared.errors import Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLoad:
    concurrencies: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int  # requests of each client, one after the other


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRow:
    concurrency: int
    tokens_per_s: float
    ttft_ms: Spread
    itl_ms: Spread
    errors: int


async def measure(url: str, load: ServeLoad, clock: Clock) -> list[ServeRow]:
    """Raises Unavailable. No prompt is sent twice, in no run: it would be found in a cache."""
    seeds = itertools.count(int(clock.wall() * 1000))

    def prompts(concurrency: int, rounds: int) -> list[list[int]]:
        return random_prompts(next(seeds), concurrency * rounds, load.prompt_tokens)

    async with stream_client(url, clock) as client:
        await _round(client, load, prompts(2, 1), concurrency=2, clock=clock)  # nobody's first
        return [
            await _round(client, load, prompts(c, load.rounds), concurrency=c, clock=clock)
            for c in load.concurrencies
        ]


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
class Comparison:
    """Medians over alternating runs. `ratio` is elastic over static throughput."""

    concurrency: int
    elastic_tokens_per_s: float
    static_tokens_per_s: float

    @property
    def ratio(self) -> float:
        return self.elastic_tokens_per_s / self.static_tokens_per_s


async def compare_static(
    load: ServeLoad, clock: Clock, *, pairs: int, flags: Sequence[str], console: Console
) -> list[Comparison]:
    """Both instances stand at once and are measured in turn, the order changing from pair to pair:
    what else the machine does then strikes both alike. Raises Unavailable."""
    rates: dict[tuple[bool, int], list[float]] = {}
    async with AsyncExitStack() as stack:
        elastic = await stack.enter_async_context(own_instance(flags))
        static = await stack.enter_async_context(
            own_instance([*flags, "--static", "--instance", "bench-static"])
        )
        for pair in range(pairs):
            order = [(False, elastic), (True, static)]
            for is_static, target in order if pair % 2 == 0 else reversed(order):
                if target.url is None:
                    raise Unavailable("the instance has no gateway")
                for row in await measure(target.url, load, clock):
                    rates.setdefault((is_static, row.concurrency), []).append(row.tokens_per_s)
                    kind = "static" if is_static else "elastic"
                    console.print(
                        f"  pair {pair + 1}/{pairs} {kind:8} concurrency {row.concurrency:3}: "
                        f"{row.tokens_per_s:.1f} tokens/s",
                        highlight=False,
                    )
    return [
        Comparison(
            concurrency=c,
            elastic_tokens_per_s=percentile(rates[False, c], 50),
            static_tokens_per_s=percentile(rates[True, c], 50),
        )
        for c in load.concurrencies
    ]


def serve_table(rows: Sequence[ServeRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in (
        *("concurrency", "tokens/s", "TTFT p50 ms", "p99", "max"),
        *("between tokens p50 ms", "p99", "max", "errors"),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.concurrency),
            f"{row.tokens_per_s:.1f}",
            *row.ttft_ms.cells(),
            *row.itl_ms.cells(),
            str(row.errors),
        )
    return table


def comparison_table(rows: Sequence[Comparison]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("concurrency", "elastic tokens/s", "static tokens/s", "overhead"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.concurrency),
            f"{row.elastic_tokens_per_s:.1f}",
            f"{row.static_tokens_per_s:.1f}",
            f"{(1 - row.ratio) * 100:+.1f} %",
        )
    return table
