"""A rank that reads a damaged expert, or finds no checkpoint, says so and leaves; the others serve
on, and it is back as soon as the files are whole again."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from gpu_worker.checkpoint.manifest import write_manifest
from gpu_worker.checkpoint.shards import StoredTensor, read_tensors
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from tests.support.cluster import running_cluster
from tests.unit.gpu_worker.cpu.runs import SMALL

EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
PROMPT = list(range(10, 30))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def flip(tensor: StoredTensor) -> None:
    """One bit of it; twice is not at all."""
    with tensor.path.open("r+b") as file:
        file.seek(tensor.first_byte)
        (byte,) = file.read(1)
        file.seek(tensor.first_byte)
        file.write(bytes([byte ^ 1]))


async def wait_for_complaint(run_dir: Path, text: str) -> None:
    async with asyncio.timeout(60):
        while not any(text in path.read_text() for path in run_dir.rglob("*.log")):  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def test_a_rank_refuses_a_damaged_expert_and_joins_once_it_is_whole(tmp_path: Path) -> None:
    model = tmp_path / "model"
    create_seeded_checkpoint(model, seed=7, **SMALL)
    write_manifest(model)
    expert = read_tensors(model)[EXPERT]
    async with running_cluster(tmp_path / "run", model, ranks=2) as cluster:
        before = await cluster.stream(PROMPT, max_tokens=8)
        assert before.error is None
        flip(expert)
        os.kill((await cluster.wait_live(2))[1], signal.SIGKILL)
        await wait_for_complaint(tmp_path / "run", f"tensor {EXPERT} is damaged")
        assert list(await cluster.live_ranks()) == [0]
        assert await cluster.stream(PROMPT, max_tokens=8) == before
        flip(expert)
        await cluster.wait_live(2)
        assert await cluster.stream(PROMPT, max_tokens=8) == before


async def test_a_rank_comes_back_once_the_volume_with_its_checkpoint_does(tmp_path: Path) -> None:
    model = tmp_path / "model"
    create_seeded_checkpoint(model, seed=7, **SMALL)
    async with running_cluster(tmp_path / "run", model, ranks=2) as cluster:
        before = await cluster.stream(PROMPT, max_tokens=8)
        assert before.error is None
        away = model.rename(tmp_path / "away")
        os.kill((await cluster.wait_live(2))[1], signal.SIGKILL)
        await wait_for_complaint(tmp_path / "run", f"starfish rank: {model} is not a folder")
        assert list(await cluster.live_ranks()) == [0]
        assert await cluster.stream(PROMPT, max_tokens=8) == before
        away.rename(model)
        await cluster.wait_live(2)
        assert await cluster.stream(PROMPT, max_tokens=8) == before
