"""Schedules in which etcd itself misbehaves, alone or together with other faults. One seed is one
schedule."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from tests.sim.cluster import SimCluster
from tests.sim.etcd_faults import EtcdFaults
from tests.sim.faults import Faults
from tests.sim.schedules import (
    MapChecker,
    Outcome,
    check_sessions,
    check_untouched,
    run_world,
    sizes_of,
    traffic,
)


def run_etcd_schedule(seed: int) -> Outcome:
    """Raises AssertionError, TimeoutError or what a service raised, if an invariant fell."""
    planes = random.Random(seed * 32452843 + 1).choice([1, 2])
    return run_world(seed, replace(sizes_of(seed), num_control_planes=planes), _run)


async def _run(cluster: SimCluster) -> Outcome:
    maps = MapChecker(cluster)
    await cluster.start()
    others = Faults(cluster)
    alone = cluster.seed % 2 == 0
    harmless = others.harmless or (alone and cluster.seed % 4 == 0)
    etcd = EtcdFaults(cluster, others.within_s, harmless=harmless)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(traffic(cluster, others.within_s))
            tasks.create_task(etcd.run())
            if not alone:
                tasks.create_task(others.run())
        cluster.heal()
        await _settle(cluster)
        check_sessions(cluster)
        if harmless:
            check_untouched(cluster)
        await _recover_from_a_death(cluster)
    except BaseException as error:
        done = sorted([*etcd.done, *others.done], key=lambda text: float(text.split()[0]))
        error.add_note(f"seed {cluster.seed} {cluster.sizes}: " + "; ".join(done))
        raise
    moves = sum(c.session.moves for c in cluster.clients if c.session is not None)
    done = (*etcd.done, *others.done)
    return Outcome(cluster.seed, done, maps.num_maps, moves, cluster.copies.num_found)


async def _settle(cluster: SimCluster) -> None:
    await cluster.until(cluster.all_ended, cluster.sizes.settle_s)
    await cluster.until(cluster.all_live, cluster.sizes.settle_s)


async def _recover_from_a_death(cluster: SimCluster) -> None:
    """Whatever etcd did before: somebody leads, and everybody hears of what happens now."""
    before = {rank: agent.member for rank, agent in cluster.agents.items()}
    cluster.kill_rank(0)

    def is_back() -> bool:
        return cluster.all_live() and cluster.agents[0].member != before[0]

    await cluster.until(is_back, cluster.sizes.settle_s)
