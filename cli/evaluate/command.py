"""The command `starfish eval`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from cli.flags import flags_from_dataclasses
from cli.outcome import run_command
from cli.run_dir import Target
from cli.target_flags import JsonFlag, TargetFlags, UrlFlag


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint that is served (default: the one in the instance's spec)."),
    ] = None
    documents: Annotated[
        Path | None,
        typer.Option(help="JSON lines with `text` (default: heldout.jsonl beside the model)."),
    ] = None
    limit: Annotated[int, typer.Option(help="Most documents to score; 0: all.", min=0)] = 0
    concurrency: Annotated[int, typer.Option(help="Documents to score at once.", min=1)] = 8
    kill: Annotated[
        bool,
        typer.Option(
            "--kill",
            help="Score again with kill -9 of a rank in the middle: not a digit may change.",
        ),
    ] = False
    drop: Annotated[
        bool,
        typer.Option(help="With --kill: also show the cost of dropping the dead rank's experts."),
    ] = True
    seed: Annotated[int, typer.Option(help="With --kill: chooses the rank.")] = 1
    own: Annotated[
        bool, typer.Option("--own", help="Start an instance of its own for this evaluation.")
    ] = False
    ranks: Annotated[int, typer.Option(help="With --own: its number of ranks.")] = 4


@flags_from_dataclasses
def evaluate_command(
    options: EvalOptions, target: TargetFlags, url: UrlFlag = None, as_json: JsonFlag = False
) -> None:
    """Measure held-out bits per byte through the server, undisturbed and with a rank killed."""
    from cli.evaluate.documents import HELD_OUT_FILE, read_documents
    from cli.evaluate.run import EvalPlan, evaluate, held_out_path, print_report
    from cli.evaluate.served import read_served_spec

    async def work() -> int:
        console = Console(stderr=as_json)
        async with _instance(options, target, url) as found:
            spec = await read_served_spec(found)
            folder = options.model or Path(spec.model_path)
            path = held_out_path(folder, options.documents, HELD_OUT_FILE)
            texts = read_documents(path, folder, spec.context_tokens_max)
            plan = EvalPlan(
                documents=texts[: options.limit or None],
                model=folder,
                concurrency=options.concurrency,
                kill=options.kill,
                drop=options.kill and options.drop,
                seed=options.seed,
            )
            report = await evaluate(found, plan, console)
        if as_json:
            print(json.dumps(msgspec.to_builtins(report)))
        else:
            print_report(report, console)
        return 1 if report.same_to_the_bit is False else 0

    run_command(work())


@asynccontextmanager
async def _instance(
    options: EvalOptions, target: TargetFlags, url: str | None
) -> AsyncIterator[Target]:
    """The instance to evaluate. Raises Unavailable, ConfigError."""
    from cli.bench.temporary_instance import temporary_instance

    if not options.own:
        yield target.target(url)
        return
    model = ("--model", str(options.model)) if options.model else ()
    async with temporary_instance(["--ranks", str(options.ranks), *model]) as own:
        yield own if url is None else own.with_url(url)
