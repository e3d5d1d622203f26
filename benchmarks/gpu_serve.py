"""Measures the whole server through deaths, as its clients see it: etcd, control plane, gateway,
node agent and ranks under a steady load of greedy streams. Faults hit 1 … 16 ranks at once, which
then rejoin. Every token of the streams that ran when ranks died or joined is compared with that of
an undisturbed instance without prefix cache. Prints a table at the end; `--out` gets the JSON.

    python -m benchmarks.gpu_serve --device cpu --ranks 4 --faults KILL:1 STOP:1
    python -m benchmarks.gpu_serve --device cuda --ranks 32 --streams 128 --seeded-dir /dev/shm/m \\
        --config num_hidden_layers=12 hidden_size=2048 num_experts=32 --redundant-experts 32 \\
        --faults KILL:1 KILL:2 KILL:4 KILL:8 KILL:16 STOP:1

Ranks that share a card do so under CUDA MPS, without --no-cuda-mps; docs/gpu.md says how many slots
fit on one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from benchmarks.gpu_serve_fault import Fault, FaultResult, FaultTiming, inject_fault
from benchmarks.gpu_serve_gaps import first_wrong
from benchmarks.gpu_serve_load import SteadyLoad, Turn
from benchmarks.random_checkpoint import entries_of, make_checkpoint
from cli.bench.fault_observer import FaultObserver
from cli.bench.stats import Spread
from cli.bench.stream_client import StreamClient, run_all, stream_client
from cli.bench.temporary_instance import temporary_instance
from cli.bench.temporary_options import TemporaryInstanceOptions
from cli.up.model import shipped_model
from shared.clock import SystemClock
from shared.errors import ConfigError, StarfishError, Unavailable

_WARM_UP_S = 1.0
_PAUSE_S = 1.0  # longer than a rank that others outlive may be stopped
_FORM_TIMEOUT_S = 60.0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--redundant-experts", type=int, default=-1)
    parser.add_argument("--slots-per-rank", type=int, default=0)
    parser.add_argument("--model", type=Path, help="checkpoint; default: the one that ships")
    parser.add_argument("--seeded-dir", type=Path, help="make a random one there, gone at the end")
    parser.add_argument("--family", default="qwen3_moe", help="of the random checkpoint")
    parser.add_argument(
        "--config",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="entries of the random checkpoint's config.json",
    )
    parser.add_argument(
        "--rank-option",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="options of the ranks, such as kv_tokens=65536",
    )
    parser.add_argument(
        "--no-cuda-mps", action="store_true", help="ranks that share a card take turns on it"
    )
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument(
        "--faults",
        nargs="*",
        default=["KILL:1"],
        metavar="SIGNAL:RANKS",
        help="KILL, STOP or PAUSE (stop for a second) so many ranks at once; between two faults "
        "they rejoin",
    )
    parser.add_argument("--before-s", type=float, default=3.0)
    parser.add_argument("--settle-s", type=float, default=3.0)
    parser.add_argument("--rejoin-timeout-s", type=float, default=60.0)
    parser.add_argument("--limit-s", type=float, default=600.0, help="no fault begins later")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unchecked", action="store_true", help="compare no tokens: gaps alone")
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def faults_of(texts: Sequence[str], num_ranks: int) -> list[Fault]:
    """Raises ConfigError."""
    faults = []
    for text in texts:
        name, _, count = text.partition(":")
        if (
            name not in ("KILL", "STOP", "PAUSE")
            or not count.isdigit()
            or not 0 < int(count) < num_ranks
        ):
            raise ConfigError(f"--faults {text}: say KILL:N, STOP:N or PAUSE:N, N below --ranks")
        paused_s = _PAUSE_S if name == "PAUSE" else 0.0
        number = signal.SIGKILL if name == "KILL" else signal.SIGSTOP
        faults.append(Fault(number=number, num_ranks=int(count), paused_s=paused_s))
    return faults


def own_options(args: argparse.Namespace, model: Path | None) -> TemporaryInstanceOptions:
    """Raises ConfigError."""
    return TemporaryInstanceOptions(
        model=model,
        ranks=args.ranks,
        device=args.device,
        redundant_experts=args.redundant_experts,
        slots_per_rank=args.slots_per_rank,
        rank_options=args.rank_option,
        cuda_mps=not args.no_cuda_mps,
    )


class Experiment:
    """`result` is complete after every fault."""

    def __init__(self, args: argparse.Namespace, faults: Sequence[Fault]) -> None:
        self._args, self._faults = args, faults
        self._clock = SystemClock()
        self._began = self._clock.now()
        self.result: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}}
        self.struck: list[FaultResult] = []

    async def run(self, model: Path | None) -> None:
        """Raises Unavailable."""
        disturbed: list[list[Turn]] = []
        own = own_options(self._args, model)
        async with self._instance(own, keep_logs=self._args.logs) as (client, observer):
            await self._inject_all(client, observer, disturbed)
        if self._args.unchecked:
            return
        async with self._instance(own.without_cache()) as (client, _):
            for index, turns in enumerate(disturbed):
                await self._compare(client, index, turns)

    @contextlib.asynccontextmanager
    async def _instance(
        self, own: TemporaryInstanceOptions, *, keep_logs: Path | None = None
    ) -> AsyncIterator[tuple[StreamClient, FaultObserver]]:
        instance = temporary_instance(
            own.flags(),
            environment=own.environment(),
            keep_logs=keep_logs,
            on_progress=lambda text: self._print(f"starts: {text}"),
        )
        async with instance as target:
            if target.url is None:
                raise Unavailable("the instance has no gateway")
            async with (
                stream_client(target.url, self._clock) as client,
                FaultObserver.watching(target) as observer,
            ):
                await observer.wait_until_all_ranks_in_map(_FORM_TIMEOUT_S)
                self._print("whole")
                yield client, observer

    async def _inject_all(
        self, client: StreamClient, observer: FaultObserver, disturbed: list[list[Turn]]
    ) -> None:
        args, clock = self._args, self._clock
        load = SteadyLoad(
            client,
            clock,
            streams=args.streams,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            seed=args.seed << 32,
        )
        pace = FaultTiming(
            before_s=args.before_s,
            settle_s=args.settle_s,
            rejoin_timeout_s=args.rejoin_timeout_s,
        )
        draw = random.Random(args.seed)
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(load.run())
            await asyncio.sleep(_WARM_UP_S)
            for fault in self._faults:
                if clock.now() - self._began > args.limit_s:
                    self._print(f"no time left for {fault}")
                    break
                struck, turns = await inject_fault(load, observer, fault, pace, draw, clock)
                self.struck.append(struck)
                disturbed.append(turns)
                self._record(struck)
                if struck.rejoined_s is None:
                    self._print(f"not whole {args.rejoin_timeout_s:.0f} s after {fault}: stopped")
                    break
            loading.cancel()

    async def _compare(self, client: StreamClient, index: int, turns: Sequence[Turn]) -> None:
        """Raises Unavailable if the undisturbed instance does not answer."""
        wrong: list[str] = []
        for first in range(0, len(turns), self._args.streams):
            batch = turns[first : first + self._args.streams]
            answers = await run_all(client, [t.prompt for t in batch], self._args.new_tokens)
            if failed := [r.error for r in answers if r.error is not None]:
                raise Unavailable(f"the undisturbed run failed: {failed[0]}")
            for turn, answer in zip(batch, answers, strict=True):
                if (token := first_wrong(turn, answer.ids)) is not None:
                    wrong.append(_wrong(turn, token, self.struck[index]))
        self.struck[index] = replace(self.struck[index], checked=len(turns), wrong=tuple(wrong))
        self._record(self.struck[index])

    def _record(self, struck: FaultResult) -> None:
        self.result["faults"] = msgspec.to_builtins(self.struck)
        self._print(row(struck))
        if struck.failed:
            self._print(f"  failed: {struck.failed[0]}")
        for wrong in struck.wrong:
            self._print(f"  wrong: {wrong}")
        if self._args.out is not None:
            self._args.out.write_text(json.dumps(self.result, indent=1))

    def _print(self, text: str) -> None:
        print(f"{self._clock.now() - self._began:7.1f} s  {text}", flush=True)


def _wrong(turn: Turn, token: int, struck: FaultResult) -> str:
    """The time of the first wrong token: that of the chunk with the same index, as most chunks have
    one token."""
    record = turn.record
    whose = "victim" if record.rank in struck.victims else "survivor"
    came = [at - struck.struck_at for at in record.arrivals]
    when = f", {came[min(token, len(came) - 1)]:.3f} s after the fault" if came else ""
    return (
        f"token {token} of {len(record.ids)}{when}, of a stream that began on rank {record.rank}, "
        f"a {whose}, {record.sent_at - struck.struck_at:.3f} s after it"
    )


def row(struck: FaultResult) -> str:
    recovered = f"{struck.recovered_ms:.0f} ms" if struck.recovered_ms is not None else "never"
    rejoined = f"{struck.rejoined_s:.1f} s" if struck.rejoined_s is not None else "never"
    return (
        f"{struck.fault:8} gap p50/p99/max {_cells(struck.gap_ms)} ms (usual p99 "
        f"{struck.usual_gap_p99_ms:.1f}; victims' {_cells(struck.gap_on_victims_ms)}), "
        f"95 % of the share after {recovered}, "
        f"{struck.tokens_per_s_before:.0f} -> {struck.tokens_per_s_after:.0f} tok/s "
        f"(share {struck.surviving_share:.2f}), streams {struck.streams}, failed "
        f"{len(struck.failed)}, wrong {len(struck.wrong)} of {struck.checked}; rejoined after "
        f"{rejoined}, {len(struck.in_place)} in place, gap {_cells(struck.rejoin_gap_ms)} ms"
    )


def _cells(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.p50:.0f}/{spread.p99:.0f}/{spread.max:.0f}"


def main() -> int:
    args = parse()
    made = failed = False
    struck: list[FaultResult] = []
    try:
        faults = faults_of(args.faults, args.ranks)
        entries = entries_of(args.config)
        experiment = Experiment(args, faults)
        struck = experiment.struck
        model = args.model or shipped_model()
        if args.seeded_dir is not None:
            model, made = args.seeded_dir, not args.seeded_dir.exists()
            if made:
                make_checkpoint(model, entries, SystemClock(), family=args.family)
        uvloop.run(experiment.run(model))
    except* StarfishError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        print(f"gpu_serve: {type(error).__name__}: {error}", file=sys.stderr)
        failed = True
    finally:
        if made:
            shutil.rmtree(args.seeded_dir, ignore_errors=True)
    print(f"{args.ranks} ranks, {args.streams} streams of {args.new_tokens} tokens")
    for each in struck:
        print(row(each))
    return 1 if failed or any(each.wrong or each.failed for each in struck) else 0


if __name__ == "__main__":
    sys.exit(main())
