"""`starfish checkpoint`: the manifest of hashes by which ranks verify a checkpoint.
`gpu_worker.model_tools` computes the hashes, in a separate process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.outcome import run_command
from cli.up.model import run_model_tool
from cli.up.stages import Stages
from shared.clock import SystemClock

checkpoint = typer.Typer(
    help="Hashes of a checkpoint's tensors: ranks refuse weights that do not match them.",
    no_args_is_help=True,
)

Folder = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="Hugging Face checkpoint.")
]


@checkpoint.command()
def manifest(folder: Folder) -> None:
    """Write starfish.manifest.json beside the shards: the hashes of the files as they are now."""
    run_command(
        _run("manifest", folder, f"Hashing {folder.name}", "starfish.manifest.json written")
    )


@checkpoint.command()
def verify(folder: Folder) -> None:
    """Check every tensor of every shard against starfish.manifest.json."""
    run_command(_run("verify", folder, f"Verifying {folder.name}", "all tensors match"))


async def _run(tool: str, folder: Path, title: str, result: str) -> int:
    with Stages(Console(), SystemClock()).stage(title) as stage:
        await run_model_tool(tool, str(folder), stage=stage)
        stage.result = result
    return 0
