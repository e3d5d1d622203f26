"""More deaths than slots can hold: streams go on with experts on demand, and their tokens are the
same."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from tests.support.cluster import running_cluster
from tests.unit.gpu_worker.cpu.runs import SMALL

PROMPT = list(range(10, 30))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


async def test_streams_go_on_though_too_few_slots_are_left(tmp_path: Path) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    create_seeded_checkpoint(model, seed=7, **SMALL)
    flags = ("--slots-per-rank", "4", "--redundant-experts", "0")  # 8 experts
    async with running_cluster(run_dir, model, ranks=2, flags=flags) as cluster:
        expected = await cluster.stream(PROMPT, max_tokens=60)
        pids = await cluster.wait_live(2)
        streams = [asyncio.create_task(cluster.stream(PROMPT, max_tokens=60)) for _ in range(4)]
        await asyncio.sleep(0.1)
        os.kill(pids[1], signal.SIGKILL)
        assert [await stream for stream in streams] == [expected] * 4
        assert await cluster.stream(PROMPT, max_tokens=60) == expected
        await cluster.wait_live(2)
        assert await cluster.stream(PROMPT, max_tokens=60) == expected
        log = "".join(path.read_text() for path in (run_dir / "logs").glob("control*"))
    assert "below_capacity" in log
