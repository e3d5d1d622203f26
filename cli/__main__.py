"""The `starfish` command: which module answers which subcommand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.bench.commands import bench
from cli.checkpoint import checkpoint
from cli.etcd_setup_options import EtcdSetupOptions
from cli.evaluate.command import evaluate_command
from cli.flags import flags_from_dataclasses
from cli.keys import keys
from cli.outcome import run_command
from cli.plan.command import plan
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


@app.command()
@flags_from_dataclasses
def up(options: UpOptions) -> None:
    """Start a whole instance on this host, show one completion, serve until Ctrl-C."""
    from cli.up.instance_driver import run_up

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
        found = await read_status(target.target(), experts=experts)
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


def main() -> None:
    app()


if __name__ == "__main__":
    main()
