"""The `starfish` command: its flags, and which module answers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.bench.commands import bench
from cli.checkpoint import checkpoint
from cli.evaluate.command import evaluate_command
from cli.outcome import run_command
from cli.plan import plan
from cli.run_dir import Target, default_run_dir, resolve_target
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
app.command()(plan)
app.command(name="eval")(evaluate_command)

Instance = Annotated[
    str | None, typer.Option("--instance", help="Name of the instance (default: default).")
]
Etcd = Annotated[str | None, typer.Option("--etcd", help="etcd endpoints, HOST:PORT[,HOST:PORT…].")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder of the run, as given to `starfish up`.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for machines.")]


@app.command()
def up(
    *,
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face checkpoint; without it the small one that ships."),
    ] = None,
    seeded: Annotated[
        bool,
        typer.Option("--seeded", help="Serve random weights of the reference size: a benchmark."),
    ] = False,
    model_dir: Annotated[
        Path | None, typer.Option(help="Where the random checkpoint is kept.")
    ] = None,
    ranks: Annotated[int, typer.Option(help="How many ranks.")] = 4,
    redundant_experts: Annotated[
        int,
        typer.Option(
            "--redundant-experts",
            "--ep-num-redundant-experts",
            help="Replicas beyond one of each expert, per layer; -1: a second one of every expert.",
        ),
    ] = -1,
    slots_per_rank: Annotated[
        int, typer.Option(help="Places for experts on a rank; 0: as many as are useful.")
    ] = 0,
    host: Annotated[str, typer.Option(help="Address of the HTTP API.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the HTTP API.")] = 8000,
    etcd: Annotated[
        str | None, typer.Option(help="Use the etcd at HOST:PORT[,…], not an embedded one.")
    ] = None,
    control_planes: Annotated[int, typer.Option(help="1, or 2 for one on standby.")] = 1,
    instance: Annotated[str, typer.Option(help="Name of the instance.")] = "default",
    run_dir: RunDir = None,
    demo: Annotated[bool, typer.Option(help="Stream one completion at the start.")] = True,
    static: Annotated[
        bool, typer.Option("--static", help="No failure detection: a baseline to measure by.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, or auto: CUDA where there is a card and the model runs on it."
        ),
    ] = "auto",
    cuda_mps: Annotated[
        bool | None,
        typer.Option(
            "--cuda-mps/--no-cuda-mps",
            help="Share cards under a CUDA MPS daemon; default: with more ranks than cards.",
        ),
    ] = None,
    transfer_protocol: Annotated[
        str, typer.Option(help="Mooncake transport between ranks: tcp or rdma.")
    ] = "tcp",
    mooncake_ib_device: Annotated[
        str, typer.Option(help="RDMA devices for Mooncake, comma-separated.")
    ] = "",
    elastic_ep_backend: Annotated[
        str | None, typer.Option(help="SGLang's spelling; only mooncake.")
    ] = None,
    moe_a2a_backend: Annotated[
        str | None, typer.Option(help="SGLang's spelling; only mooncake.")
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Capacity of each rank's KV cache, in tokens.")
    ] = None,
    host_experts_gb: Annotated[
        float,
        typer.Option(
            help="GB of memory for copies of experts, which all ranks on cards share, so that "
            "orphans load fast; -1: a quarter of what is free, 0: none."
        ),
    ] = -1.0,
    context_tokens_max: Annotated[
        int,
        typer.Option(
            "--context-tokens-max",
            help="Longest prompt and answer together; 0: what the model was made for.",
        ),
    ] = 0,
    timeout_s: Annotated[
        float, typer.Option(help="Give up where the instance does not serve by then.")
    ] = 300.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Start a whole instance on this host, show one completion, serve until Ctrl-C."""
    from cli.up.instance_driver import run_up
    from cli.up.model import default_model_dir
    from cli.up.options import UpOptions, check_aliases

    async def work() -> int:
        check_aliases(elastic_ep_backend, moe_a2a_backend)
        options = UpOptions(
            model=model,
            seeded=seeded,
            model_dir=model_dir or default_model_dir(),
            ranks=ranks,
            redundant_experts=redundant_experts,
            slots_per_rank=slots_per_rank,
            host=host,
            port=port,
            etcd=etcd,
            control_planes=control_planes,
            instance=instance,
            run_dir=(run_dir or default_run_dir(instance)).absolute(),
            demo=demo,
            static=static,
            device=device,
            cuda_mps=cuda_mps,
            transfer_protocol=transfer_protocol,
            ib_device=mooncake_ib_device,
            kv_tokens=kv_tokens,
            host_experts_gb=host_experts_gb,
            context_tokens_max=context_tokens_max,
            timeout_s=timeout_s,
            log_level=log_level,
        )
        return await run_up(options, Console())

    run_command(work())


@app.command()
def status(
    etcd: Etcd = None,
    instance: Instance = None,
    run_dir: RunDir = None,
    as_json: AsJson = False,
) -> None:
    """Show the epoch, the leader, every rank, and how many failures the map survives."""
    import json

    from cli.observe.status import read_status, render_status

    async def work() -> int:
        found = await read_status(_target(etcd, instance, run_dir))
        if as_json:
            print(json.dumps(found, indent=2))
        else:
            render_status(found, Console())
        return 0

    run_command(work())


@app.command()
def watch(
    etcd: Etcd = None,
    instance: Instance = None,
    run_dir: RunDir = None,
    as_json: AsJson = False,
) -> None:
    """Follow the instance live: leases, suspicions, verdicts, maps; one line each."""
    from cli.observe.watch import watch_instance

    async def work() -> int:
        target = _target(etcd, instance, run_dir)
        return await watch_instance(target, as_json=as_json, clock=SystemClock())

    run_command(work())


@app.command()
def kill(
    rank: Annotated[int, typer.Argument(help="Which rank.")],
    signal: Annotated[str, typer.Option(help="KILL, STOP, CONT or TERM.")] = "KILL",
    etcd: Etcd = None,
    instance: Instance = None,
    run_dir: RunDir = None,
) -> None:
    """Inject a fault: a real signal to a rank's process on this host."""
    from cli.observe.kill import kill_rank

    async def work() -> int:
        return await kill_rank(_target(etcd, instance, run_dir), rank, signal)

    run_command(work())


def _target(etcd: str | None, instance: str | None, run_dir: Path | None) -> Target:
    return resolve_target(etcd=etcd, instance=instance, run_dir=run_dir)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
