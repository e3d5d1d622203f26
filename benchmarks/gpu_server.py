"""Measures the server as its clients see it: decode tokens/s, time to first token (TTFT) and time
between tokens (ITL) by batch, and the share of the roofline. Prints a table at the end; `--out`
gets the JSON after every row.

    python -m benchmarks.gpu_server --seeded-dir /dev/shm/qwen3 --ranks 1 2 --out server.json
    python -m benchmarks.gpu_server --device cpu --seeded-dir /tmp/m --shape reference --ranks 2 \\
        --batches 1 4 --config num_hidden_layers=2

For each instance, batch × ranks clients send one random prompt each, all at once. Tokens/s are
counted from the moment when all streams have their first token to the moment when the first stream
ends; TTFT and ITL are of whole streams.

The floor of a step is the bytes that the card reads for it, divided by the copy rate (reads plus
writes), which the same run measures. The bytes are: attention, routers and head once for each rank
on the card, the KV of all sequences, and each expert that the step's tokens chose once. The number
of these experts is not measured. It is the expected number if tokens choose uniformly at random:
E (1 - (1 - k/E)^batch) of E experts with top-k, where batch counts the sequences of all ranks. With
several cards the floor is that of the card with most ranks. On the CPU the share means little: all
ranks share one memory, and small weights stay in caches.

If there are more ranks than cards, ranks share cards under CUDA MPS. Every rank holds
--slots-per-rank experts of each layer; by default every expert is held twice if there are two ranks
or more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from benchmarks.gpu_serve_load import Arrival
from benchmarks.gpu_server_rates import CardSharing, Round, ServerRow, format_row, server_row, table
from benchmarks.gpu_shapes import CHECKPOINTS, sizes_of
from benchmarks.random_checkpoint import entries_of, make_checkpoint
from cli.bench.stream_client import StreamClient, random_prompts, run_all, stream_client
from cli.bench.temporary_instance import temporary_instance
from cli.bench.temporary_options import TemporaryInstanceOptions, parse_rank_options
from cli.up.device import count_gpus, num_visible_gpus, plan_device
from shared.clock import SystemClock
from shared.errors import StarfishError, Unavailable

_WARM_UP_TOKENS = 8
_BLOCK_TOKENS = 16
_STEP_TOKENS_OF_PEERS = 192
"""What a step of a rank with peers holds by itself; one that is alone on its card holds more."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", type=Path, help="checkpoint, in place of a random one")
    parser.add_argument("--seeded-dir", type=Path, help="make a random one there, gone at the end")
    parser.add_argument("--keep", action="store_true", help="leave it there for the next run")
    parser.add_argument("--shape", choices=sorted(CHECKPOINTS), default="qwen3-30b")
    parser.add_argument(
        "--config",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="entries of the random checkpoint's config.json in place of the shape's",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="instances, in turn")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=2, help="of each batch")
    parser.add_argument("--static", action="store_true", help="without failure detection")
    parser.add_argument("--redundant-experts", type=int, default=-1)
    parser.add_argument("--slots-per-rank", type=int, default=0)
    parser.add_argument(
        "--rank-option",
        nargs="*",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="options of the ranks; default: KV memory for the largest batch",
    )
    parser.add_argument("--start-timeout-s", type=float, default=600.0)
    parser.add_argument("--limit-s", type=float, default=3600.0, help="no batch begins later")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if min(*args.ranks, *args.batches, args.prompt_tokens, args.new_tokens - 1, args.rounds) < 1:
        parser.error("ranks, batches, prompts and rounds are at least 1, new tokens 2")
    if (args.model is None) == (args.seeded_dir is None):
        parser.error("say either --model or --seeded-dir")
    return args


def rank_options(batch_max: int, prompt_tokens: int, new_tokens: int) -> dict[str, str]:
    """KV memory for the largest batch. Steps hold as many prompt tokens as sequences, so that
    streams that begin together soon decode together, if that is more than they hold anyhow."""
    blocks = -(-(prompt_tokens + new_tokens) // _BLOCK_TOKENS) + 1
    return {
        "kv_block_tokens": str(_BLOCK_TOKENS),
        "kv_tokens": str(batch_max * blocks * _BLOCK_TOKENS),
        "running_max": str(batch_max),
        **(
            {"step_tokens_max": str(2 * batch_max)} if 2 * batch_max > _STEP_TOKENS_OF_PEERS else {}
        ),
    }


def cpu_copy_rate(nbytes: int = 512 << 20) -> float:
    """TB/s of a copy in memory, read plus written."""
    import torch

    source = torch.ones(nbytes, dtype=torch.uint8)
    target = torch.ones_like(source)
    times = []
    for _ in range(7):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return 2 * nbytes / sorted(times)[len(times) // 2] / 1e12


def copy_rate(on_cuda: bool) -> float:
    """TB/s, measured in a process of its own, which leaves nothing on the card."""
    from benchmarks.gpu import copy_rate as cuda_copy_rate

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(cuda_copy_rate if on_cuda else cpu_copy_rate).result()


class Measurement:
    """`rows` and the JSON grow by one row after every batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises ConfigError."""
        self._args = args
        self._clock = SystemClock()
        self._began = self._clock.now()
        wanted = rank_options(max(args.batches), args.prompt_tokens, args.new_tokens)
        self._rank_options = wanted | parse_rank_options(args.rank_option)
        self._seed = args.seed
        self._cards = 1
        self._copy_tb_per_s: float | None = None
        self._start_s: dict[int, float] = {}
        self.rows: list[ServerRow] = []

    async def run(self, model: Path) -> None:
        """Raises StarfishError."""
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        args = self._args
        cards = 0 if args.device == "cpu" else num_visible_gpus(await count_gpus(), os.environ)
        plan = plan_device(args.device, None, max(args.ranks), cards)
        self._cards = cards if plan.on_cuda else 1
        self._copy_tb_per_s = await asyncio.to_thread(copy_rate, plan.on_cuda)
        self._print(f"{plan}: copies at {self._copy_tb_per_s:.3f} TB/s")
        for num_ranks in args.ranks:
            await self._measure(model, num_ranks)

    async def _measure(self, model: Path, num_ranks: int) -> None:
        args, clock = self._args, self._clock
        options = TemporaryInstanceOptions(
            model=model,
            ranks=num_ranks,
            device=args.device,
            redundant_experts=args.redundant_experts,
            slots_per_rank=args.slots_per_rank,
            static=args.static,
            rank_options=[f"{name}={value}" for name, value in self._rank_options.items()],
        )
        began = clock.now()
        async with temporary_instance(
            options.flags(),
            environment=options.environment(),
            keep_logs=args.logs / str(num_ranks) if args.logs is not None else None,
            start_timeout_s=args.start_timeout_s,
            on_progress=lambda text: self._print(f"{num_ranks} ranks: {text}"),
        ) as target:
            self._start_s[num_ranks] = clock.now() - began
            if target.url is None:
                raise Unavailable("the instance has no gateway")
            async with stream_client(target.url, clock) as client:
                warm_up = await run_all(client, self._prompts(2 * num_ranks), _WARM_UP_TOKENS)
                if failed := [r.error for r in warm_up if r.error is not None]:
                    raise Unavailable(f"the first requests failed: {failed[0]}")
                await self._measure_batches(client, num_ranks, model)

    async def _measure_batches(self, client: StreamClient, num_ranks: int, model: Path) -> None:
        args = self._args
        for batch in args.batches:
            if self._clock.now() - self._began > args.limit_s:
                self._print(f"no time left for {num_ranks} ranks from batch {batch} on")
                return
            rounds = [await self._round(client, batch * num_ranks) for _ in range(args.rounds)]
            row = server_row(
                rounds,
                CardSharing(ranks=num_ranks, cards=self._cards),
                batch=batch,
                prompt_tokens=args.prompt_tokens,
                sizes=sizes_of(model),
                copy_tb_per_s=self._copy_tb_per_s,
            )
            self._record(row)

    async def _round(self, client: StreamClient, concurrency: int) -> Round:
        streams: list[list[Arrival]] = [[] for _ in range(concurrency)]

        async def follow(prompt: Sequence[int], stream: list[Arrival]) -> Any:
            def note(num_tokens: int) -> None:
                stream.append(Arrival(at=self._clock.now(), num_tokens=num_tokens))

            return await client.run(prompt, self._args.new_tokens, note)

        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(follow(prompt, stream))
                for prompt, stream in zip(self._prompts(concurrency), streams, strict=True)
            ]
        return Round(records=[task.result() for task in running], streams=streams)

    def _prompts(self, count: int) -> list[list[int]]:
        """Each prompt is sent once, because a second one would be found in a prefix cache."""
        self._seed += 1
        return random_prompts(self._seed, count, self._args.prompt_tokens)

    def _record(self, row: ServerRow) -> None:
        self.rows.append(row)
        self._print(format_row(row))
        if self._args.out is None:
            return
        result = {
            "arguments": {name: str(value) for name, value in vars(self._args).items()},
            "rank_options": self._rank_options,
            "copy_tb_per_s": self._copy_tb_per_s,
            "start_s": {str(ranks): seconds for ranks, seconds in self._start_s.items()},
            "rows": msgspec.to_builtins(self.rows),
        }
        self._args.out.write_text(json.dumps(result, indent=1))

    def _print(self, text: str) -> None:
        print(f"{self._clock.now() - self._began:7.1f} s  {text}", flush=True)


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the checkpoint goes all the same
    made = failed = False
    rows: list[ServerRow] = []
    try:
        measurement = Measurement(args)
        rows = measurement.rows
        model = args.model
        if model is None:
            model, made = args.seeded_dir, not args.seeded_dir.exists()
            if made:
                entries = CHECKPOINTS[args.shape] | entries_of(args.config)
                make_checkpoint(model, entries, SystemClock())
        uvloop.run(measurement.run(model))
    except* StarfishError as group:
        print(f"gpu_server: {group.exceptions[0]}", file=sys.stderr)
        failed = True
    except* (asyncio.CancelledError, KeyboardInterrupt):
        failed = True
    finally:
        if made and not args.keep:
            shutil.rmtree(args.seeded_dir, ignore_errors=True)
    print(table(rows))
    return 1 if failed or any(row.errors for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
