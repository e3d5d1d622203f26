"""Flags of `starfish eval`."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from cli.outcome import run_command
from cli.run_dir import Target, resolve_target


def evaluate_command(
    *,
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint that is served; default: the one in the instance's spec."),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(help="JSON lines with `text`; default: heldout.jsonl beside the model."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Only so many documents; 0: all.", min=0)] = 0,
    concurrency: Annotated[int, typer.Option(help="Documents at once.", min=1)] = 8,
    kill: Annotated[
        bool,
        typer.Option(
            "--kill", help="Once more with kill -9 of a rank in the middle: not a digit may change."
        ),
    ] = False,
    drop: Annotated[
        bool, typer.Option(help="With --kill: what dropping the dead experts would have cost.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Chooses the rank that dies.")] = 1,
    own: Annotated[bool, typer.Option("--own", help="Start an instance for this.")] = False,
    ranks: Annotated[int, typer.Option(help="Ranks of an own instance.")] = 4,
    url: Annotated[str | None, typer.Option(help="Gateway of a running instance.")] = None,
    etcd: Annotated[str | None, typer.Option(help="etcd of a running instance.")] = None,
    instance: Annotated[str | None, typer.Option(help="Name of a running instance.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Of a running `starfish up`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Held-out bits per byte through the server, in peace and with a rank killed."""
    from cli.bench.temporary_instance import temporary_instance
    from cli.evaluate.documents import HELD_OUT_FILE, read_documents
    from cli.evaluate.run import EvalPlan, evaluate, held_out_path, print_report
    from cli.evaluate.served import read_served_spec

    async def work() -> int:
        console = Console(stderr=as_json)
        async with AsyncExitStack() as stack:
            if own:
                flags = ["--ranks", str(ranks), *(("--model", str(model)) if model else ())]
                target = await stack.enter_async_context(temporary_instance(flags))
            else:
                target = resolve_target(etcd=etcd, instance=instance, run_dir=run_dir)
            if url is not None:
                target = Target(etcd=target.etcd, instance=target.instance, url=url)
            spec = await read_served_spec(target)
            folder = model or Path(spec.model_path)
            path = held_out_path(folder, documents, HELD_OUT_FILE)
            texts = read_documents(path, folder, spec.context_tokens_max)
            plan = EvalPlan(
                documents=texts[: limit or None],
                model=folder,
                concurrency=concurrency,
                kill=kill,
                drop=kill and drop,
                seed=seed,
            )
            report = await evaluate(target, plan, console)
        if as_json:
            print(json.dumps(msgspec.to_builtins(report)))
        else:
            print_report(report, console)
        return 1 if report.same_to_the_bit is False else 0

    run_command(work())
