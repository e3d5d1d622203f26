"""The `starfish` command: which module answers which subcommand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.admin.commands import add_admin_commands
from cli.bench.commands import bench
from cli.checkpoint import checkpoint
from cli.etcd_setup_options import EtcdSetupOptions
from cli.evaluate.command import evaluate_command
from cli.flags import flags_from_dataclasses
from cli.keys import keys
from cli.outcome import run_command
from cli.plan.command import plan
from cli.services import add_service_commands
from cli.target_flags import JsonFlag, TargetFlags
from cli.up.options import UpOptions
from shared.clock import SystemClock

app = typer.Typer(
    name="starfish",
    help="Serves mixture-of-experts models over elastic expert parallelism: kill a rank, and "
    "every stream goes on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench, name="bench")
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(keys, name="keys")
app.command()(plan)
app.command(name="eval")(evaluate_command)
add_service_commands(app)


@app.command()
@flags_from_dataclasses
def up(options: UpOptions) -> None:
    """Start a whole instance on this host, show one completion, serve until Ctrl-C."""
    from cli.up.run import run_up

    run_command(run_up(options, Console()))


@app.command()
@flags_from_dataclasses
def status(
    target: TargetFlags,
    as_json: JsonFlag = False,
    experts: Annotated[
        bool, typer.Option("--experts", help="Also show which experts tokens choose most.")
    ] = False,
) -> None:
    """Show the epoch, the leader, every rank, and how many failures the map survives."""
    import json

    from cli.observe.status import read_status, render_status

    async def work() -> int:
        found = await read_status(target.target(), SystemClock(), experts=experts)
        if as_json:
            print(json.dumps(found, indent=2))
        else:
            render_status(found, Console())
        return 0

    run_command(work())


@app.command()
@flags_from_dataclasses
def watch(target: TargetFlags, as_json: JsonFlag = False) -> None:
    """Follow the instance live, one line per event: leases, suspicions, verdicts, maps."""
    from cli.observe.watch import watch_instance

    async def work() -> int:
        return await watch_instance(target.target(), as_json=as_json, clock=SystemClock())

    run_command(work())


@app.command()
@flags_from_dataclasses
def kill(
    rank: Annotated[int, typer.Argument(help="Number of the rank.")],
    target: TargetFlags,
    signal: Annotated[str, typer.Option(help="KILL, STOP, CONT or TERM.")] = "KILL",
) -> None:
    """Inject a fault: send a real signal to a rank's process on this host."""
    from cli.observe.kill import kill_rank

    async def work() -> int:
        return await kill_rank(target.target(), rank, signal)

    run_command(work())


add_admin_commands(app)


@app.command(name="etcd-certificates")
def etcd_certificates(
    folder: Annotated[Path, typer.Argument(help="Folder, closed to other users.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address of an etcd member; repeat it for each (default: this host)."
        ),
    ] = None,
    instance: Annotated[
        str, typer.Option(help="Also make those of this instance's services.")
    ] = "",
) -> None:
    """Make an authority, etcd's certificate and root's. An authority that is there is used."""
    from cli.etcd_setup import make_certificates

    async def work() -> int:
        for text in make_certificates(folder, host or ["localhost", "127.0.0.1"], instance):
            print(text)
        return 0

    run_command(work())


@app.command(name="etcd-setup")
@flags_from_dataclasses
def etcd_setup(options: EtcdSetupOptions) -> None:
    """Make the users and roles of an instance on an etcd that runs elsewhere. Can be repeated."""
    from cli.etcd_setup import set_up

    async def work() -> int:
        await set_up(options, print)
        return 0

    run_command(work())


@app.command(name="support-bundle")
@flags_from_dataclasses
def support_bundle(
    target: TargetFlags,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write (default: starfish-support-INSTANCE-TIME.tar.gz here)."),
    ] = None,
    log_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with further logs, as node agents keep; repeat it for each."),
    ] = None,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option(
            help="HTTP address of a process that is not registered in etcd, such as a control "
            "plane; repeat it for each."
        ),
    ] = None,
) -> None:
    """Pack versions, configuration, status, etcd's keys, logs, metrics and facts about this host,
    without secrets, for whoever helps."""
    import os

    from cli.run_dir import default_run_dir
    from cli.support.command import BundleSources, bundle_path, run_folder_of, write_bundle

    async def work() -> int:
        found = target.target()
        path = output or bundle_path(found.instance)
        run_dir = target.run_dir or default_run_dir(found.instance)
        sources = BundleSources(
            target=found,
            run_dir=run_folder_of(run_dir, found),
            log_dirs=log_dir or (),
            metrics_urls=metrics_url or (),
        )
        missing = await write_bundle(path, sources, os.environ)
        print(path)
        for name in missing:
            print(f"without {name}: contents.json in the bundle says why")
        return 0

    run_command(work())


def main() -> None:
    app()


if __name__ == "__main__":
    main()
