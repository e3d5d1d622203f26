"""The checkpoint that an instance serves: the given one, the one that ships with the project, or a
seeded one that is created once and kept."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from cli.up.stages import Stage
from shared.errors import CheckpointError
from shared.model_spec import read_model_spec, with_drafts
from shared.private_folder import cache_folder

SEEDED_NAME = "starfish-seeded-moe"
SHIPPED = Path(__file__).parents[2] / "models" / "starling-14m"
"""Part of a checkout, but not of an installed wheel."""


def default_model_dir() -> Path:
    return cache_folder(os.environ) / "models"


def shipped_model() -> Path | None:
    return SHIPPED if (SHIPPED / "config.json").exists() else None


async def seeded_model(model_dir: Path, stage: Stage) -> Path:
    """Creates the checkpoint if necessary. Raises CheckpointError if it cannot be written."""
    folder = model_dir / SEEDED_NAME
    if not (folder / "config.json").exists():
        stage.update(f"creating it in {folder}")
        await run_model_tool("seed", "--out", str(folder), stage=stage)
    return folder


async def check_model(folder: Path, speculative_tokens: int = 0) -> str:
    """Describes the model. Raises CheckpointError if Starfish cannot serve its config.json, or if
    it cannot draft so many tokens a step."""
    spec = await asyncio.to_thread(read_model_spec, folder)
    with_drafts(spec, speculative_tokens)
    experts = f"{spec.num_experts} experts, top-{spec.top_k}" if spec.moe_layers else "dense"
    return f"{folder.name} ({spec.num_layers} layers, {experts}, hidden {spec.hidden_size})"


async def run_model_tool(*arguments: str, stage: Stage) -> None:
    """Runs `python -m gpu_worker.model_tools …` as a separate process, so that its memory is freed
    afterwards. Raises CheckpointError with its message if it fails."""
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
