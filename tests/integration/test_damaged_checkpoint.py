"""A rank that reads a damaged expert, or finds no checkpoint, says so and leaves; the others serve
on, and it is back as soon as the files are whole again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gpu_worker.checkpoint.manifest import write_manifest
from gpu_worker.checkpoint.shards import StoredTensor, read_tensors
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from tests.support.cluster import Cluster, running_cluster
from tests.unit.gpu_worker.cpu.runs import SMALL

EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
PROMPT = list(range(10, 30))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]


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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    create_seeded_checkpoint(folder, seed=7, **SMALL)
    write_manifest(folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Whole again after each test."""
    run_dir = tmp_path_factory.mktemp("damaged") / "run"
    async with running_cluster(run_dir, model, ranks=2) as running:
        yield running


async def test_a_rank_refuses_a_damaged_expert_and_joins_once_it_is_whole(
    cluster: Cluster, model: Path
) -> None:
    expert = read_tensors(model)[EXPERT]
    before = await cluster.stream(PROMPT, max_tokens=8)
    assert before.error is None
    flip(expert)
    os.kill((await cluster.wait_live(2))[1], signal.SIGKILL)
    await wait_for_complaint(cluster.run_dir, f"tensor {EXPERT} is damaged")
    assert list(await cluster.live_ranks()) == [0]
    assert await cluster.stream(PROMPT, max_tokens=8) == before
    flip(expert)
    await cluster.wait_live(2)
    assert await cluster.stream(PROMPT, max_tokens=8) == before


async def test_a_rank_comes_back_once_the_volume_with_its_checkpoint_does(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    before = await cluster.stream(PROMPT, max_tokens=8)
    assert before.error is None
    away = model.rename(tmp_path / "away")
    os.kill((await cluster.wait_live(2))[1], signal.SIGKILL)
    await wait_for_complaint(cluster.run_dir, f"starfish rank: {model} is not a folder")
    assert list(await cluster.live_ranks()) == [0]
    assert await cluster.stream(PROMPT, max_tokens=8) == before
    away.rename(model)
    await cluster.wait_live(2)
    assert await cluster.stream(PROMPT, max_tokens=8) == before
