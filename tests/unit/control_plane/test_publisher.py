"""A write that etcd does not answer. On virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from control_plane.cluster_state import ClusterState
from control_plane.publisher import Publisher
from control_plane.writes import PublishMap
from shared.errors import StoreUnavailable
from shared.keys import Keys
from shared.store import Compare, Delete, Put
from shared.types import Incarnation, Member, RankId
from tests.sim.sim_loop import SimLoop
from tests.sim.sim_rank import SimClock
from tests.support.gateway_harness import toy_map
from tests.support.memory_store import MemoryEtcd, MemoryStore

KEYS = Keys("test")
FIRST_S, LONGEST_S = 0.5, 2.0
MEMBER = Member(rank=RankId(0), incarnation=Incarnation(1))


class SilentStore(MemoryStore):
    """As if each write were handed to a leader of etcd that is dead, while `silent`."""

    silent = True

    async def txn(self, compare: Sequence[Compare], then: Sequence[Put | Delete]) -> int:
        if self.silent:
            await asyncio.get_running_loop().create_future()
        return await super().txn(compare, then)


def test_the_first_wait_is_short_and_the_next_ones_longer() -> None:
    waits = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        clock = SimClock(loop)
        store = SilentStore(MemoryEtcd(clock))
        publisher = Publisher(store, KEYS, clock, (FIRST_S, LONGEST_S))
        write = PublishMap(expert_map=toy_map(1, [MEMBER]))
        for silent in (True, True, True, True, False, True):
            store.silent, began_at = silent, loop.time()
            if not silent:
                await publisher.write(write, 0, ClusterState(keys=KEYS))
                continue
            with pytest.raises(StoreUnavailable, match="has not answered within"):
                await publisher.write(write, 0, ClusterState(keys=KEYS))
            waits.append(loop.time() - began_at)

    with asyncio.Runner(loop_factory=SimLoop) as virtual:
        virtual.run(run())
    assert waits == pytest.approx([0.5, 1.0, 2.0, 2.0, 0.5])
