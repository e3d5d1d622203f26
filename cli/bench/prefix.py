"""`starfish bench prefix`: time to first token of a new prompt, and of one whose beginning is in
the rank's KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from cli.bench.loads import PrefixLoad
from cli.bench.stats import Spread, percentile
from cli.bench.stream_client import StreamClient, random_prompts, stream_client
from shared.clock import Clock
from shared.errors import Unavailable

NEW_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixRow:
    """`faster`: the median of cold prompts divided by the median of these."""

    prompts: str
    ttft_ms: Spread
    faster: float


async def measure_prefix(url: str, load: PrefixLoad, clock: Clock) -> list[PrefixRow]:
    """Sends one request at a time, cold and warm in turn, so that other work on the machine affects
    both alike. A prompt is cold only once, so each run has new prompts. Raises Unavailable."""
    ttft_ms: dict[str, list[float]] = {"cold": [], "the same again": [], "a turn more": []}
    seed = int(clock.wall() * 1000)
    prompts = random_prompts(seed, load.tries + 1, load.prompt_tokens)
    turns = random_prompts(seed + 1, load.tries, load.turn_tokens)
    async with stream_client(url, clock) as client:
        await _ttft_ms(client, prompts.pop())  # warm-up
        for prompt, turn in zip(prompts, turns, strict=True):
            for kind, sent in zip(ttft_ms, (prompt, prompt, [*prompt, *turn]), strict=True):
                ttft_ms[kind].append(await _ttft_ms(client, sent))
    cold_ms = percentile(ttft_ms["cold"], 50)
    return [
        PrefixRow(prompts=kind, ttft_ms=Spread.of(each), faster=cold_ms / percentile(each, 50))
        for kind, each in ttft_ms.items()
    ]


async def _ttft_ms(client: StreamClient, prompt: Sequence[int]) -> float:
    record = await client.run(prompt, NEW_TOKENS)
    if record.error is not None:
        raise Unavailable(f"a request failed: {record.error}")
    return record.ttft_ms


def prefix_table(rows: Sequence[PrefixRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("prompt", "TTFT p50 ms", "p99", "max", "times faster"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    for row in rows:
        table.add_row(row.prompts, *row.ttft_ms.cells(), f"{row.faster:.1f}")
    return table
