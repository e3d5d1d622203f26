"""Flags of `starfish bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from cli.bench.temporary_options import TemporaryInstanceOptions, parse_rank_options
from cli.outcome import run_command
from cli.run_dir import Target, resolve_target
from shared.clock import SystemClock
from shared.errors import ConfigError

bench = typer.Typer(
    help="Measure an instance: throughput, faults, the exchange.", no_args_is_help=True
)

Url = Annotated[str | None, typer.Option(help="Gateway of a running instance.")]
RunDir = Annotated[Path | None, typer.Option(help="Of a running `starfish up`.")]
Etcd = Annotated[str | None, typer.Option(help="etcd of a running instance.")]
Instance = Annotated[str | None, typer.Option(help="Name of a running instance.")]
Own = Annotated[bool, typer.Option("--own", help="Start an instance for this measurement.")]
Model = Annotated[Path | None, typer.Option(help="Checkpoint of an own instance.")]
Ranks = Annotated[int, typer.Option(help="Ranks of an own instance.")]
Device = Annotated[str, typer.Option(help="Of an own instance: cpu, cuda, or auto.")]
RedundantExperts = Annotated[
    int, typer.Option(help="Of an own instance: replicas beyond one of each expert; -1: a second.")
]
SlotsPerRank = Annotated[
    int, typer.Option(help="Of an own instance: places for experts on a rank; 0: as many as useful")
]
RankOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="Of an own instance: an option of its ranks; repeatable."
    ),
]
StartTimeout = Annotated[
    float, typer.Option("--start-timeout-s", help="An own instance serves by then.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, for machines.")]


@bench.command()
def serve(
    url: Url = None,
    run_dir: RunDir = None,
    instance: Instance = None,
    own: Own = False,
    model: Model = None,
    ranks: Ranks = 4,
    device: Device = "auto",
    redundant_experts: RedundantExperts = -1,
    slots_per_rank: SlotsPerRank = 0,
    rank_option: RankOption = None,
    start_timeout_s: StartTimeout = 600.0,
    concurrency: Annotated[str, typer.Option(help="Clients at once, comma-separated.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 96,
    rounds: Annotated[int, typer.Option(help="Requests of each client.")] = 2,
    compare_static: Annotated[
        bool,
        typer.Option("--compare-static", help="An elastic against a static instance, in turn."),
    ] = False,
    pairs: Annotated[int, typer.Option(help="Measurements of each in the comparison.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Tokens per second, time to first token, time between tokens."""
    from cli.bench.serve import (
        ERRORS,
        ServeLoad,
        comparison_table,
        measure,
        serve_table,
    )
    from cli.bench.serve import compare_static as compare

    async def work() -> int:
        console, clock = Console(stderr=as_json), SystemClock()
        load = ServeLoad(
            concurrencies=_parse_numbers("--concurrency", concurrency),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
        )
        options = _temporary_options(
            model, ranks, device, redundant_experts, slots_per_rank, rank_option
        )
        if compare_static:
            compared = await compare(
                load,
                clock,
                pairs=pairs,
                options=options,
                start_timeout_s=start_timeout_s,
                console=console,
            )
            _show(compared, comparison_table(compared), console, as_json)
            counts = [row for row in compared if row.quantity == ERRORS]
            return 1 if any(row.elastic or row.static for row in counts) else 0
        started = _start_temporary(options, start_timeout_s, console) if own else None
        async with _gateway(started, url, instance, run_dir) as url_used:
            rows = await measure(url_used, load, clock)
        _show(rows, serve_table(rows), console, as_json)
        return 1 if any(row.errors for row in rows) else 0

    run_command(work())


@bench.command()
def prefix(
    url: Url = None,
    run_dir: RunDir = None,
    instance: Instance = None,
    own: Own = False,
    model: Model = None,
    ranks: Ranks = 4,
    device: Device = "auto",
    redundant_experts: RedundantExperts = -1,
    slots_per_rank: SlotsPerRank = 0,
    rank_option: RankOption = None,
    start_timeout_s: StartTimeout = 600.0,
    tries: Annotated[int, typer.Option(help="How many prompts.")] = 10,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    turn_tokens: Annotated[int, typer.Option(help="Tokens that a next turn adds.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Time to first token of a prompt cold, again, and with a turn more: the prefix cache."""
    from cli.bench.prefix import PrefixLoad, measure_prefix, prefix_table

    async def work() -> int:
        load = PrefixLoad(tries=tries, prompt_tokens=prompt_tokens, turn_tokens=turn_tokens)
        options = _temporary_options(
            model, ranks, device, redundant_experts, slots_per_rank, rank_option
        )
        console = Console(stderr=as_json)
        started = _start_temporary(options, start_timeout_s, console) if own else None
        async with _gateway(started, url, instance, run_dir) as url_used:
            rows = await measure_prefix(url_used, load, SystemClock())
        _show(rows, prefix_table(rows), console, as_json)
        return 0

    run_command(work())


@bench.command()
def fault(
    url: Url = None,
    run_dir: RunDir = None,
    etcd: Etcd = None,
    instance: Instance = None,
    own: Own = False,
    model: Model = None,
    ranks: Ranks = 4,
    device: Device = "auto",
    redundant_experts: RedundantExperts = -1,
    slots_per_rank: SlotsPerRank = 0,
    rank_option: RankOption = None,
    start_timeout_s: StartTimeout = 600.0,
    tries: Annotated[int, typer.Option(help="How many faults.")] = 10,
    streams: Annotated[int, typer.Option(help="Streams at once.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 96,
    seed: Annotated[int, typer.Option(help="Chooses prompts, victims and moments.")] = 1,
    signal: Annotated[str, typer.Option(help="KILL or STOP.")] = "KILL",
    as_json: AsJson = False,
) -> None:
    """Kill ranks under load; the longest gap that each client sees, and where the time went."""
    from cli.bench.fault import FaultLoad, compare_answers, print_report, run_faults
    from cli.observe.kill import SIGNALS

    async def work() -> int:
        if signal not in ("KILL", "STOP"):
            raise ConfigError(f"--signal {signal!r}: say KILL or STOP")
        console = Console(stderr=as_json)
        load = FaultLoad(
            tries=tries,
            streams=streams,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            seed=seed,
            number=SIGNALS[signal],
        )
        options = _temporary_options(
            model, ranks, device, redundant_experts, slots_per_rank, rank_option
        )
        clock = SystemClock()
        async with AsyncExitStack() as stack:
            if own:
                started = _start_temporary(options, start_timeout_s, console)
                target = await stack.enter_async_context(started)
            else:
                target = _running_target(etcd, instance, run_dir)
            if url is not None:
                target = Target(etcd=target.etcd, instance=target.instance, url=url)
            fault_runs = await run_faults(target, load, clock, console)
            if not own:
                report = await compare_answers(target, fault_runs, load, clock)
        if own:
            async with _start_temporary(
                options.without_cache(), start_timeout_s, console
            ) as target:
                report = await compare_answers(target, fault_runs, load, clock)
        if as_json:
            print(json.dumps(msgspec.to_builtins(report) | {"added_p99_ms": report.added_p99_ms}))
        else:
            print_report(report, console)
        return 1 if report.wrong else 0

    run_command(work())


@bench.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def exchange(context: typer.Context) -> None:
    """Microseconds per dispatch + combine, by tokens and ranks, between processes of their own."""
    import subprocess

    command = [sys.executable, "-m", "benchmarks.exchange", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@asynccontextmanager
async def _gateway(
    started: AbstractAsyncContextManager[Target] | None,
    url: str | None,
    instance: str | None,
    run_dir: Path | None,
) -> AsyncIterator[str]:
    """Of the instance that is started, or of the running one that is meant. Raises ConfigError
    where none is."""
    async with AsyncExitStack() as stack:
        if started is not None:
            found = (await stack.enter_async_context(started)).url
        else:
            found = url or _running_target(None, instance, run_dir).url
        if found is None:
            raise ConfigError("which gateway? pass --url or --run-dir, or --own")
        yield found


@asynccontextmanager
async def _start_temporary(
    options: TemporaryInstanceOptions, start_timeout_s: float, console: Console
) -> AsyncIterator[Target]:
    """Raises Unavailable."""
    from cli.bench.temporary_instance import temporary_instance
    from cli.up.stages import Stage

    async with AsyncExitStack() as stack:
        with Stage(console, "instance") as stage:
            target = await stack.enter_async_context(
                temporary_instance(
                    options.flags(),
                    environment=options.environment(),
                    start_timeout_s=start_timeout_s,
                    on_progress=stage.update,
                )
            )
        yield target


def _temporary_options(
    model: Path | None,
    ranks: int,
    device: str,
    redundant_experts: int,
    slots_per_rank: int,
    rank_option: list[str] | None,
) -> TemporaryInstanceOptions:
    """Raises ConfigError."""
    return TemporaryInstanceOptions(
        model=model,
        ranks=ranks,
        device=device,
        redundant_experts=redundant_experts,
        slots_per_rank=slots_per_rank,
        rank_options=parse_rank_options(rank_option or []),
    )


def _running_target(etcd: str | None, instance: str | None, run_dir: Path | None) -> Target:
    return resolve_target(etcd=etcd, instance=instance, run_dir=run_dir)


def _parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} {text!r}: say numbers such as 1,8,32") from None
    if min(numbers) < 1:
        raise ConfigError(f"{flag} {text!r}: numbers of clients are at least 1")
    return numbers


def _show(rows: Any, table: Any, console: Console, as_json: bool) -> None:
    if as_json:
        print(json.dumps(msgspec.to_builtins(rows)))
    else:
        console.print(table)
