"""Random schedules of faults, and the invariants that every one of them must leave standing. One
seed is one schedule, to the last message."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.expert_map import ExpertMap
from shared.records import unpack_map
from shared.store import WatchEvent
from shared.types import Member
from tests.sim.cluster import ETCD, LEASE_TTL_S, SimCluster, SimClusterSizes
from tests.sim.faults import Faults
from tests.sim.invariants import InvariantChecker
from tests.sim.sim_loop import SimLoop

OUTAGE_DEADLINE_S = 10.0
CARD_FIRST_SEED = 1 << 30


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a schedule did and how it ended, for the report of a failing seed."""

    seed: int
    faults: tuple[str, ...]
    epochs: int
    moves: int
    restored: int  # KV blocks that were not computed again


class MapChecker:
    """Checks every map at the moment of its publication (invariants 3, 4 and 6)."""

    def __init__(self, cluster: SimCluster) -> None:
        self._cluster = cluster
        self._last: ExpertMap | None = None
        self._left: set[Member] = set()
        self.num_maps = 0
        publish = cluster.etcd._publish

        def seen(event: WatchEvent) -> None:
            if event.key == cluster.keys.map and event.value is not None:
                self._check(unpack_map(event.value))
            publish(event)

        cluster.etcd._publish = seen  # type: ignore[method-assign]

    def _check(self, new: ExpertMap) -> None:
        last, self._last = self._last, new
        self.num_maps += 1
        assert not new.uncovered(), f"epoch {new.epoch} leaves experts out"
        assert len({m.rank for m in new.members}) == len(new.members)
        if last is None:
            return
        self._left |= set(last.members) - set(new.members)
        assert not self._left & set(new.members), "who was left out is back"
        assert new.epoch > last.epoch, f"epoch {new.epoch} after {last.epoch}"
        if new.cause.startswith(("dead", "drained")):
            self._check_moves(last, new)

    def _check_moves(self, last: ExpertMap, new: ExpertMap) -> None:
        """A death moves no surviving replica, unless an orphan took a surplus one's slot. Where
        several died before the map was there, what was surplus at the first death, and gave its
        slot to an orphan, may be an orphan itself by the second: then only what stayed counts."""
        survivors = [m.rank for m in new.members if last.has(m)]
        held = last.placement[:, survivors]
        if sum(not new.has(m) for m in last.members) > 1:
            held = np.where(new.placement[:, survivors] == held, held, -1)
        for member in new.members:
            if not last.has(member):
                continue
            before, after = last.placement[:, member.rank], new.placement[:, member.rank]
            changed = (before >= 0) & (after != before)
            for layer, slot in np.argwhere(changed):
                orphan = after[layer, slot]
                assert orphan < 0 or orphan not in held[layer], "a surviving replica was moved"


async def traffic(cluster: SimCluster, within_s: float) -> None:
    """Sessions that come and go while things break; a few are cancelled."""
    for _ in range(cluster.rng.randint(6, 12)):
        await asyncio.sleep(cluster.rng.uniform(0.0, within_s / 8))
        prompt = tuple(cluster.rng.randrange(90) for _ in range(cluster.rng.randint(1, 24)))
        if prompt[0] % 2:  # half of them begin alike, so that ranks share blocks among sessions
            prompt = (*range(len(prompt) * 3 // 4), *prompt[len(prompt) * 3 // 4 :])
        client = cluster.send(prompt, cluster.rng.randint(1, 40))
        if cluster.rng.random() < 0.1:
            await asyncio.sleep(cluster.rng.uniform(0.0, 0.1))
            cluster.cancel(client)


def check_sessions(cluster: SimCluster) -> None:
    """Invariants 1, 2 and 9: what a client has is what the oracle says, and it has an end."""
    for client in cluster.clients:
        session = client.session
        assert session is not None
        got = tuple(session.emitted)
        assert got == client.expected[: len(got)], f"{session.id}: {got} != {client.expected}"
        assert session.ended, f"{session.id} never ended"
        if not client.cancelled:
            assert session.failure is None, f"{session.id}: {session.failure}"
            assert len(got) == client.num_tokens, f"{session.id} lost tokens"


def check_untouched(cluster: SimCluster) -> None:
    """Invariants 7 and 8: no rank lost its life, and no session its rank."""
    incarnations = {agent.member.incarnation for agent in cluster.agents.values() if agent.member}
    assert incarnations == {1}, f"ranks died of what did not touch them: {cluster.describe()}"
    moved = [c.session.id for c in cluster.clients if c.session is not None and c.session.moves]
    assert not moved, f"sessions moved for nothing: {moved}"


def run_control_plane_outage(seed: int) -> Outcome:
    """Invariant 8: etcd and every control plane are away for good, and nothing else is wrong."""
    return run_world(seed, sizes_of(seed), _run_control_plane_outage)


async def _run_control_plane_outage(cluster: SimCluster) -> Outcome:
    await cluster.start()
    for number in range(cluster.sizes.num_control_planes):
        cluster.kill_control_plane(number)
    for host in cluster.hosts():
        if host != ETCD:
            cluster.sever(host, ETCD)
    await asyncio.sleep(2 * LEASE_TTL_S)
    await traffic(cluster, within_s=2.0)
    await cluster.until(cluster.all_ended, OUTAGE_DEADLINE_S)
    check_sessions(cluster)
    check_untouched(cluster)
    alone = ("etcd and the control planes are away",)
    return Outcome(cluster.seed, alone, 1, 0, cluster.copies.num_found)


def run_scenario(
    scenario: Callable[[SimCluster], Coroutine[Any, Any, None]], seed: int, sizes: SimClusterSizes
) -> None:
    """`scenario` finds an instance that serves."""

    async def whole(cluster: SimCluster) -> Outcome:
        await cluster.start()
        await scenario(cluster)
        return Outcome(seed, (), 0, 0, 0)

    run_world(seed, sizes, whole)


def sizes_of(seed: int) -> SimClusterSizes:
    """Mostly the common instance; some small, large, tight and slow ones. From CARD_FIRST_SEED on
    the ranks are on cards."""
    if seed >= CARD_FIRST_SEED:
        return card_sizes_of(seed)
    rng = random.Random(seed * 104729 + 7)
    ranks, slots, redundant = rng.choice(
        [(4, 4, 6), (4, 4, 6), (4, 4, 6), (4, 2, 2), (2, 6, 6), (6, 3, 6)]
    )
    return SimClusterSizes(
        num_ranks=ranks,
        slots_per_rank=slots,
        redundant_experts=redundant,
        slow=rng.random() < 0.2,
        heal_after_s=rng.choice([0.05, 0.3]),
        has_loads=seed % 8 == 1,
        drafts=seed % 16 in (0, 7, 10, 13),
    )


def card_sizes_of(seed: int) -> SimClusterSizes:
    from tests.sim.sim_card import CardSizes  # imports torch

    rng = random.Random(seed * 104729 + 11)
    ranks, slots, redundant = rng.choice(
        [(4, 4, 6), (4, 2, 2), (2, 6, 6), (4, 3, 6), (6, 2, 6), (6, 3, 6), (8, 2, 10)]
    )
    has_pauses = rng.random() < 0.5
    return SimClusterSizes(
        num_ranks=ranks,
        slots_per_rank=slots,
        redundant_experts=redundant,
        heal_after_s=rng.choice([0.05, 0.3]),
        cards=CardSizes(
            ranks_per_card=rng.choice([1, 1, 2, ranks]),
            time_sliced=rng.random() < 0.3,
            step_s=rng.choice([0.002, 0.005, 0.005, 0.02, 0.1]),
            graph_timeout_s=rng.choice([0.4, 2.0, 5.0]),
            expert_s=rng.choice([(0.0002, 0.002), (0.005, 0.05)]),
            has_pauses=has_pauses,
            map_s=rng.choice([(0.001, 0.01), (0.3, 1.0)]) if has_pauses else (0.001, 0.01),
            load_stalls=rng.choice([(), (0.0, 0.1, 0.41)]) if has_pauses else (),
        ),
        has_loads=seed % 16 == 9,
    )


def run_schedule(seed: int, sizes: SimClusterSizes | None = None) -> Outcome:
    """Raises AssertionError, TimeoutError or what a service raised, where an invariant fell."""
    return run_world(seed, sizes or sizes_of(seed), _run)


def run_world(
    seed: int,
    sizes: SimClusterSizes,
    scenario: Callable[[SimCluster], Coroutine[Any, Any, Outcome]],
) -> Outcome:
    loop = SimLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(scenario(SimCluster(seed=seed, loop=loop, sizes=sizes)))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _run(cluster: SimCluster) -> Outcome:
    maps = MapChecker(cluster)
    InvariantChecker(cluster)
    await cluster.start()
    faults = Faults(cluster)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(traffic(cluster, faults.within_s))
            tasks.create_task(faults.run())
        cluster.heal()
        settle_s = cluster.sizes.settle_s
        await cluster.until(cluster.all_ended, settle_s)
        await cluster.until(cluster.all_live, settle_s)
        check_sessions(cluster)
        if faults.harmless:
            check_untouched(cluster)
    except BaseException as error:
        error.add_note(f"seed {cluster.seed} {cluster.sizes}: " + "; ".join(faults.done))
        raise
    moves = sum(c.session.moves for c in cluster.clients if c.session is not None)
    return Outcome(cluster.seed, tuple(faults.done), maps.num_maps, moves, cluster.copies.num_found)
