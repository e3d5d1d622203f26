"""Schedules in which people change the instance on purpose, alone or while things break. One seed
is one schedule."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from shared.desired_state import AfterDrain
from shared.types import SuspicionReason
from tests.sim.changes import Changes
from tests.sim.cluster import SimCluster, SimClusterSizes
from tests.sim.faults import Faults
from tests.sim.invariants import InvariantChecker
from tests.sim.schedules import (
    MapChecker,
    Outcome,
    check_sessions,
    run_world,
    sizes_of,
    traffic,
)
from tests.sim.sim_model import NUM_EXPERTS

NUM_SPARE_HOSTS = 2
PEACEFUL = 3
"""In one schedule of so many nothing breaks."""
CHANGES_SETTLE_S = 60.0  # a rolling restart of several ranks


def run_change_schedule(seed: int) -> Outcome:
    """Raises AssertionError, TimeoutError or what a service raised, if an invariant fell. From
    CARD_FIRST_SEED on the ranks are on cards."""
    return run_world(seed, change_sizes_of(seed), _run)


def change_sizes_of(seed: int) -> SimClusterSizes:
    """Without ranks that load or map for longer than a drain lasts."""
    sizes = replace(sizes_of(seed), num_spare_hosts=NUM_SPARE_HOSTS, slow=False)
    planes = random.Random(seed * 32452843 + 5).choice([1, 2])
    return replace(sizes, num_control_planes=planes)


async def _run(cluster: SimCluster) -> Outcome:
    maps, checker = MapChecker(cluster), InvariantChecker(cluster)
    await cluster.start()
    faults, is_peaceful = Faults(cluster), cluster.seed % PEACEFUL == 0
    changes = Changes(cluster, faults.within_s)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(traffic(cluster, faults.within_s))
            tasks.create_task(changes.run())
            if not is_peaceful:
                tasks.create_task(faults.run())
        cluster.heal()
        await changes.end()
        settle_s = cluster.sizes.settle_s
        await cluster.until(cluster.all_ended, settle_s)

        def as_asked() -> bool:
            return _is_as_asked(cluster, changes)

        await cluster.until(as_asked, settle_s + CHANGES_SETTLE_S)
        check_sessions(cluster)
        if is_peaceful and not changes.has_hurried:
            assert set(checker.causes) <= {SuspicionReason.DRAINED}, "nobody has died"
    except BaseException as error:
        done = sorted([*faults.done, *changes.done], key=lambda text: float(text.split()[0]))
        error.add_note(f"seed {cluster.seed} {cluster.sizes}: " + "; ".join(done))
        raise
    moves = sum(c.session.moves for c in cluster.clients if c.session is not None)
    done = (*faults.done, *changes.done)
    return Outcome(cluster.seed, done, maps.num_maps, moves, cluster.copies.num_found)


def _is_as_asked(cluster: SimCluster, changes: Changes) -> bool:
    """The ranks that are desired serve, where they are desired, and nothing else runs."""
    desired, members = changes.desired, set(cluster.gateway.view.members)
    wanted = set(desired.rank_ids(cluster.sizes.num_ranks))
    lingering = {d.rank for d in desired.drains if d.after is not AfterDrain.STAY}
    running = {agent.member: host for host, agent in cluster.agents.items() if agent.member}
    nodes = {m.rank: cluster.host_of_rank(host) for m, host in running.items()}
    return (
        not lingering
        and (desired.restart is None or not _can_spare_one(cluster, len(wanted)))
        and {m.rank for m in members} == wanted
        and set(running) == members
        and all(desired.node_of(rank) in ("", node) for rank, node in nodes.items())
    )


def _can_spare_one(cluster: SimCluster, num_ranks: int) -> bool:
    """Whether the others hold every expert while one is restarted. Else a restart that was asked
    for before the instance shrank waits until it grows."""
    return num_ranks > 1 and (num_ranks - 1) * cluster.sizes.slots_per_rank >= NUM_EXPERTS
