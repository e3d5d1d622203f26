"""The checkpoint that an instance serves: the one given, the one that ships with the project, or a
seeded one, made once and kept."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from cli.up.stages import Stage
from shared.errors import CheckpointError
from shared.model_spec import read_model_spec

SEEDED_NAME = "starfish-seeded-moe"
SHIPPED = Path(__file__).parents[2] / "models" / "starling-14m"
"""Beside the packages in a checkout; not part of an installed wheel."""


def default_model_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "starfish" / "models"


def shipped_model() -> Path | None:
    return SHIPPED if (SHIPPED / "config.json").exists() else None


async def seeded_model(model_dir: Path, stage: Stage) -> Path:
    """Raises CheckpointError where it cannot be written."""
    folder = model_dir / SEEDED_NAME
    if not (folder / "config.json").exists():
        stage.update(f"creating it in {folder}")
        await run_model_tool("seed", "--out", str(folder), stage=stage)
    return folder


async def check_model(folder: Path) -> str:
    """A sentence on the model. Raises CheckpointError where config.json is not one we serve."""
    spec = await asyncio.to_thread(read_model_spec, folder)
    experts = f"{spec.num_experts} experts, top-{spec.top_k}" if spec.moe_layers else "dense"
    return f"{folder.name} ({spec.num_layers} layers, {experts}, hidden {spec.hidden_size})"


async def run_model_tool(*arguments: str, stage: Stage) -> None:
    """`python -m gpu_worker.model_tools …` in a process of its own, so that what it loads is gone
    afterwards. Raises CheckpointError with its sentence where it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gpu_worker.model_tools", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        while line := (await process.stdout.readline()).decode().strip():
            done, _, total = line.partition("/")
            if done.isdigit() and total.isdigit():
                stage.update(f"{20 * (5 * int(done) // max(int(total), 1))} %")
        complaint = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
        if await process.wait() != 0:
            raise CheckpointError(complaint[-1] if complaint else f"{arguments[0]} failed")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
