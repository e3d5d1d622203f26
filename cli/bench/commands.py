"""The subcommands of `starfish bench`."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, NamedTuple

import msgspec
import typer
from rich.console import Console

from cli.bench.chaos.options import ChaosOptions
from cli.bench.loads import FaultLoad, PrefixLoad, ServeLoad
from cli.bench.soak.options import SoakOptions
from cli.bench.temporary_options import TemporaryInstanceOptions
from cli.flags import flags_from_dataclasses
from cli.outcome import run_command
from cli.run_dir import Target
from cli.target_flags import GatewayFlags, JsonFlag, TargetFlags, UrlFlag
from shared.clock import SystemClock
from shared.errors import ConfigError

bench = typer.Typer(
    help="Measure an instance: throughput, faults, the exchange.", no_args_is_help=True
)

OwnFlag = Annotated[
    bool, typer.Option("--own", help="Start an instance of its own for this measurement.")
]


@bench.command()
@flags_from_dataclasses
def serve(
    *,
    gateway: GatewayFlags,
    own: OwnFlag = False,
    options: TemporaryInstanceOptions,
    load: ServeLoad,
    compare_static: Annotated[
        bool,
        typer.Option(
            "--compare-static", help="Compare an elastic with a static instance, in turn."
        ),
    ] = False,
    pairs: Annotated[
        int, typer.Option(help="With --compare-static: measurements of each instance.")
    ] = 4,
    as_json: JsonFlag = False,
) -> None:
    """Measure tokens per second, time to first token, and time between tokens.

    Says if a gateway was what limited: its event loop had 90 % of a core or more."""
    from cli.bench.gateway_cpu import limit_warning
    from cli.bench.serve import ERRORS, comparison_table, measure, serve_table
    from cli.bench.serve import compare_static as compare

    async def work() -> int:
        load.check()
        options.check()
        console, clock = Console(stderr=as_json), SystemClock()
        if compare_static:
            compared = await compare(load, clock, pairs=pairs, options=options, console=console)
            _show(compared, comparison_table(compared), console, as_json)
            counts = [row for row in compared if row.quantity == ERRORS]
            return 1 if any(row.elastic or row.static for row in counts) else 0
        async with _gateway(gateway, options if own else None, console) as running:
            rows = await measure(running.url, load, clock, running.target)
        _show(rows, serve_table(rows), console, as_json)
        if warning := limit_warning({row.concurrency: row.gateway_cpu for row in rows}):
            console.print(warning, style="yellow", highlight=False, soft_wrap=True)
        return 1 if any(row.errors for row in rows) else 0

    run_command(work())


@bench.command()
@flags_from_dataclasses
def prefix(
    *,
    gateway: GatewayFlags,
    own: OwnFlag = False,
    options: TemporaryInstanceOptions,
    load: PrefixLoad,
    as_json: JsonFlag = False,
) -> None:
    """Measure the prefix cache: time to first token of a new prompt, the same one, and a longer."""
    from cli.bench.prefix import measure_prefix, prefix_table

    async def work() -> int:
        console = Console(stderr=as_json)
        options.check()
        async with _gateway(gateway, options if own else None, console) as running:
            rows = await measure_prefix(running.url, load, SystemClock())
        _show(rows, prefix_table(rows), console, as_json)
        return 0

    run_command(work())


@bench.command()
@flags_from_dataclasses
def fault(
    *,
    url: UrlFlag = None,
    target: TargetFlags,
    own: OwnFlag = False,
    options: TemporaryInstanceOptions,
    load: FaultLoad,
    as_json: JsonFlag = False,
) -> None:
    """Kill ranks under load: the longest gap in each client's stream, and where the time went."""
    from cli.bench.fault import compare_answers, print_report, run_faults

    async def work() -> int:
        load.check()
        options.check()
        console, clock = Console(stderr=as_json), SystemClock()
        if own:
            async with _start_temporary(options, console) as started:
                disturbed = started if url is None else started.with_url(url)
                fault_runs = await run_faults(disturbed, load, clock, console)
            async with _start_temporary(options.without_cache(), console) as started:
                report = await compare_answers(started, fault_runs, load, clock)
        else:
            running = target.target(url)
            fault_runs = await run_faults(running, load, clock, console)
            report = await compare_answers(running, fault_runs, load, clock)
        if as_json:
            print(json.dumps(msgspec.to_builtins(report) | {"added_p99_ms": report.added_p99_ms}))
        else:
            print_report(report, console)
        return 1 if report.wrong else 0

    run_command(work())


@bench.command()
@flags_from_dataclasses
def chaos(
    *,
    url: UrlFlag = None,
    target: TargetFlags,
    own: OwnFlag = False,
    options: TemporaryInstanceOptions,
    load: ChaosOptions,
    yes_break_it: Annotated[
        str,
        typer.Option(
            "--yes-break-it",
            metavar="INSTANCE",
            help="Inject the faults into a running instance: say its name once more.",
        ),
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Inject faults of every kind under load: sessions and tokens lost, gaps, time to whole."""
    from cli.bench.chaos.faults import chosen_faults
    from cli.bench.chaos.multi_host import cluster_site
    from cli.bench.chaos.picture import save_picture
    from cli.bench.chaos.report import is_exact, print_reports, to_json
    from cli.bench.chaos.run import SiteOpener, run_chaos
    from cli.bench.chaos.single_host import own_site, running_site

    async def work() -> int:
        load.check()
        options.check()
        console, clock = Console(stderr=as_json), SystemClock()
        faults = chosen_faults(load.faults, has_hosts=load.hosts > 1)
        opener: SiteOpener
        if load.hosts > 1:
            opener = functools.partial(cluster_site, options, console, clock, load.keep_logs)
        elif own:
            opener = functools.partial(own_site, options, console, load.keep_logs)
        else:
            running = target.target(url)
            if yes_break_it != running.instance:
                raise ConfigError(
                    f"clients of instance {running.instance!r} may notice its faults: pass --own, "
                    f"or --yes-break-it {running.instance}"
                )
            opener = functools.partial(running_site, running)
        reports = await run_chaos(
            opener, faults, load, clock, console, may_reopen=own or load.hosts > 1
        )
        if as_json:
            print(json.dumps(to_json(reports)))
        else:
            print_reports(reports, console)
        if load.png is not None:
            save_picture(load.png, reports)
        return 0 if is_exact(reports) else 1

    run_command(work(), cleans_up_on_term=True)


@bench.command()
@flags_from_dataclasses
def soak(
    *,
    options: TemporaryInstanceOptions,
    load: SoakOptions,
    as_json: JsonFlag = False,
) -> None:
    """Mixed load with a fault every 20 s on an instance of its own: does anything grow?

    Fails if memory, descriptors, sockets, threads, etcd's keys or files grow, or if a token differs
    from the undisturbed answer."""
    from cli.bench.chaos.faults import chosen_faults
    from cli.bench.chaos.single_host import own_site
    from cli.bench.soak.report import print_report, to_json
    from cli.bench.soak.run import UP_FLAGS, run_soak

    async def work() -> int:
        load.check()
        options.check()
        console, clock = Console(stderr=as_json), SystemClock()
        faults = chosen_faults(load.faults, has_hosts=False)
        instance = options.with_shipped_model()
        async with own_site(instance, console, load.keep_logs, UP_FLAGS) as site:
            report = await run_soak(site, faults, load, clock, console)
        print_report(report, console)
        text = json.dumps(to_json(report))
        if load.report is not None:
            load.report.write_text(text + "\n")
        if as_json:
            print(text)
        return 1 if report.reasons() else 0

    run_command(work(), cleans_up_on_term=True)


@bench.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def exchange(context: typer.Context) -> None:
    """Measure dispatch + combine between separate processes: microseconds by tokens and ranks."""
    import subprocess

    command = [sys.executable, "-m", "benchmarks.exchange", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


class _Running(NamedTuple):
    """The address of a gateway, and its instance if more is known of it."""

    url: str
    target: Target | None


@asynccontextmanager
async def _gateway(
    running: GatewayFlags, own: TemporaryInstanceOptions | None, console: Console
) -> AsyncIterator[_Running]:
    """That of an instance of `own`, or of the running one that is meant. Raises ConfigError if
    there is none."""
    if own is None:
        url = running.gateway_url()
        if url is None:
            raise ConfigError("which gateway? pass --url, --run-dir or --own")
        yield _Running(url, running.target())
        return
    async with _start_temporary(own, console) as target:
        if target.url is None:
            raise ConfigError("the instance of this measurement has no gateway")
        yield _Running(target.url, target)


@asynccontextmanager
async def _start_temporary(
    options: TemporaryInstanceOptions, console: Console
) -> AsyncIterator[Target]:
    """Raises Unavailable if the instance does not start."""
    from cli.bench.temporary_instance import temporary_instance_with_progress

    async with temporary_instance_with_progress(options, console, "instance") as target:
        yield target


def _show(rows: Any, table: Any, console: Console, as_json: bool) -> None:
    if as_json:
        print(json.dumps(msgspec.to_builtins(rows)))
    else:
        console.print(table)
