"""Operations that keep a healthy rank from answering for longer than a suspected rank may be silent
otherwise: nobody loses its incarnation, and that is so because of what ranks announce."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import replace

import pytest

from control_plane.silence import SilenceEvidence, SilenceTimings, patience_s
from gpu_worker.cuda.runner import CudaRunner
from tests.sim.cluster import SimCluster, SimClusterSizes
from tests.sim.invariants import InvariantChecker
from tests.sim.schedules import Outcome, check_sessions, run_world
from tests.sim.sim_card import CardSizes

WINDOW_S = 0.1
SLOW_UNMAPPING = SimClusterSizes(
    num_ranks=8, suspicion_window_s=WINDOW_S, cards=CardSizes(unmap_s=(0.0, 3 * WINDOW_S))
)
"""Python's lock is held for up to three windows when a successor joins."""
SLOW_MAPPING = SimClusterSizes(
    num_ranks=8,
    slots_per_rank=6,
    redundant_experts=32,
    suspicion_window_s=1.0,
    cards=CardSizes(map_s=(0.9, 1.0)),
)
"""The join of several takes longer than a suspected rank may be silent."""
MANY = (0, 2, 4, 6, 7)
SEEDS = range(3)
"""Of `SLOW_UNMAPPING`. In most the longest unmapping is long enough to end a rank unannounced."""


def run(sizes: SimClusterSizes, seed: int, *killed: int) -> None:
    """Kills these at once in the middle of streams. Raises AssertionError if another rank loses its
    incarnation, or a client a token."""

    async def whole(cluster: SimCluster) -> Outcome:
        InvariantChecker(cluster)
        await cluster.start()
        for first in range(6):
            cluster.send((first, *range(10)), 40)
        await asyncio.sleep(0.05)
        for rank in killed:
            cluster.kill_rank(rank)
        wanted = {rank: 1 + (rank in killed) for rank in cluster.agents}

        def all_joined() -> bool:
            return {m.rank: m.incarnation for m in cluster.gateway.view.members} == wanted

        await cluster.until(all_joined, 60.0)
        await cluster.until(cluster.all_ended, 60.0)
        cluster.send((1, 2, 3), 40)
        await cluster.until(cluster.all_ended, 60.0)
        check_sessions(cluster)
        assert all_joined(), cluster.describe()
        return Outcome(seed, (), 0, 0, 0)

    run_world(seed, sizes, whole)


def run_some(sizes: SimClusterSizes, *killed: int) -> None:
    for seed in SEEDS:
        run(sizes, seed, *killed)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_unmapping_of_several_windows_ends_nobody(seed: int) -> None:
    run(SLOW_UNMAPPING, seed, 2)


def test_the_mapping_of_many_joiners_ends_nobody() -> None:
    run(SLOW_MAPPING, 0, *MANY)


def ignore_announcements(monkeypatch: pytest.MonkeyPatch) -> None:
    def ignoring(evidence: SilenceEvidence, timings: SilenceTimings) -> float:
        return patience_s(replace(evidence, announced_s=0.0), timings)

    monkeypatch.setattr("control_plane.failure_detector.patience_s", ignoring)


def test_an_announcement_that_is_ignored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_announcements(monkeypatch)
    with pytest.raises(AssertionError, match="which lives"):
        run_some(SLOW_UNMAPPING, 2)


def test_an_engine_that_neither_announces_a_mapping_nor_vouches_in_it_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wait(self: CudaRunner, mapping: Future[None], *, num_joiners: int) -> None:
        while not mapping.done():
            self._pause()

    ignore_announcements(monkeypatch)
    monkeypatch.setattr(CudaRunner, "_wait_until_mapped", wait)
    with pytest.raises(AssertionError, match="which lives"):
        run(SLOW_MAPPING, 0, *MANY)
