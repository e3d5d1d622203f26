"""A rank that gets hardly any CPU time slows all of them down: it is drained, as the control plane
was asked to do, and no client's token changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cli.bench.chaos.cpu_limit import CpuLimit, limits_are_possible
from tests.support.cluster import running_cluster

MODEL = Path(__file__).parents[2] / "models" / "starling-14m"
SLOW = 1
SHARE = 0.05  # of a core
STREAMS = 4
DRAINED_WITHIN_S = 120.0  # 10 s on a machine that does nothing else


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(limits_are_possible() is not None, reason=str(limits_are_possible()))
async def test_a_rank_that_is_kept_from_running_is_drained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARFISH_CONTROL_PLANE_DRAIN_STRAGGLERS_AFTER_S", "2")
    async with running_cluster(tmp_path / "run", MODEL, ranks=3) as cluster:
        pids = await cluster.live_ranks()
        expected = await cluster.stream([5, 6, 7, 8], max_tokens=48)
        limit = CpuLimit(SHARE)
        limit.begin([pids[SLOW]])
        try:
            async with asyncio.timeout(DRAINED_WITHIN_S):
                ranks: dict[int, dict[str, Any]] = {SLOW: {"state": "live"}}
                while ranks[SLOW]["state"] != "drained":
                    streams = [cluster.stream([5, 6, 7, 8], max_tokens=48) for _ in range(STREAMS)]
                    assert await asyncio.gather(*streams) == [expected] * STREAMS
                    ranks = {rank["rank"]: rank for rank in (await cluster.status())["ranks"]}
        finally:
            limit.end()
        assert await cluster.live_ranks() == {r: p for r, p in pids.items() if r != SLOW}
        assert await cluster.stream([5, 6, 7, 8], max_tokens=48) == expected
