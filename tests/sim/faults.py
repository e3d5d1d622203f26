"""What a schedule can do to an instance, drawn from its seed: deaths, stops, cuts, and losses of
etcd and of control planes, at any moment and at the worst ones."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from tests.sim.card_faults import CardFaults
from tests.sim.cluster import ETCD, SimCluster

WAIT_FOR_MOMENT_S = 3.0

Fault = Callable[[], Awaitable[None]]


class Faults:
    """Draws faults from the seed and does them; `done` says what and when."""

    def __init__(self, cluster: SimCluster) -> None:
        self._cluster = cluster
        self._rng = random.Random(cluster.seed * 7919 + 13)
        self.done: list[str] = []
        self.within_s = self._rng.choice([1.0, 2.0, 5.0])
        self.harmless = self._rng.random() < 0.1
        """No rank is touched: none may lose its life, and no session may move (7 and 8)."""

    async def run(self) -> None:
        harmless, harmful = self._harmless(), self._harmful()
        if self._cluster.cards is not None:
            cards = CardFaults(self._cluster, self._rng, self._log_fault, is_harmless=self.harmless)
            harmless, harmful = [*harmless, *cards.harmless()], [*harmful, *cards.harmful()]
        kinds = harmless if self.harmless else [*harmful, *harmless]
        times = sorted(
            self._rng.uniform(0.0, self.within_s) for _ in range(self._rng.randint(1, 5))
        )
        now = 0.0
        async with asyncio.TaskGroup() as tasks:
            for at in times:
                await asyncio.sleep(at - now)
                now = at
                tasks.create_task(self._rng.choice(kinds)())  # type: ignore[arg-type]

    def _harmful(self) -> list[Fault]:
        return [
            self._kill_rank,
            self._kill_rank,
            self._kill_two,
            self._kill_joiner,
            self._kill_at_map,
            self._kill_at_map,
            self._stop_rank,
            self._cut_pair,
            self._cut_ranks,
            self._cut_off_rank,
        ]

    def _harmless(self) -> list[Fault]:
        return [self._kill_plane, self._cut_plane, self._lose_planes, self._lose_etcd]

    def _log_fault(self, text: str) -> None:
        self.done.append(f"{self._cluster.clock.now() - 1000:.3f} {text}")

    def _rank(self) -> int:
        return self._rng.randrange(self._cluster.sizes.num_ranks)

    # Ranks.

    async def _kill_rank(self) -> None:
        rank = self._rank()
        self._log_fault(f"kill rank {rank}")
        self._cluster.kill_rank(rank)

    async def _kill_two(self) -> None:
        first, second = self._rng.sample(range(self._cluster.sizes.num_ranks), 2)
        delay_s = self._rng.choice([0.0, self._rng.uniform(0.0, 0.02)])
        self._log_fault(f"kill ranks {first} and, {delay_s * 1000:.1f} ms later, {second}")
        self._cluster.kill_rank(first)
        await asyncio.sleep(delay_s)
        self._cluster.kill_rank(second)

    async def _kill_joiner(self) -> None:
        """Before its map is published or adopted."""
        joiner = await self._wait_for(self._joiner)
        if joiner is not None:
            await asyncio.sleep(self._rng.uniform(0.0, 0.4))
            self._log_fault(f"kill joiner {joiner}")
            self._cluster.kill_rank(joiner)

    def _joiner(self) -> int | None:
        members = set(self._cluster.gateway.view.members)
        for rank, agent in self._cluster.agents.items():
            if self._cluster.process_of(rank) is not None and agent.member not in members:
                return rank
        return None

    async def _kill_at_map(self) -> None:
        """A member of a map that is just being adopted."""
        before = self._cluster.map_revision()

        def newer() -> int | None:
            revision = self._cluster.map_revision()
            return revision if revision > before else None

        if await self._wait_for(newer, step_s=0.001) is not None:
            rank = self._rank()
            self._log_fault(f"kill rank {rank} as a map is adopted")
            self._cluster.kill_rank(rank)

    async def _wait_for(
        self, look: Callable[[], int | None], *, step_s: float = 0.01
    ) -> int | None:
        for _ in range(round(WAIT_FOR_MOMENT_S / step_s)):
            if (found := look()) is not None:
                return found
            await asyncio.sleep(step_s)
        return None

    async def _stop_rank(self) -> None:
        rank, seconds = self._rank(), self._rng.choice([0.03, 0.1, 0.3, 2.0])
        process = self._cluster.process_of(rank)
        if process is None or process.stopped:
            return
        self._log_fault(f"stop rank {rank} for {seconds} s")
        self._cluster.agents[rank].stop_rank()
        await asyncio.sleep(seconds)
        if not process.dead:
            self._cluster.agents[rank].continue_rank(process, self._cluster.loop)

    # Partitions.

    async def _cut_pair(self) -> None:
        a, b = self._rng.sample(self._cluster.hosts(), 2)
        await self._cut([(a, b)], f"cut {a} from {b}")

    async def _cut_ranks(self) -> None:
        a, b = self._rng.sample(range(self._cluster.sizes.num_ranks), 2)
        hosts = self._cluster.host_of_rank(a), self._cluster.host_of_rank(b)
        await self._cut([hosts], f"cut rank {a} from rank {b}")

    async def _cut_off_rank(self) -> None:
        alone = self._cluster.host_of_rank(self._rank())
        others = [h for h in self._cluster.hosts() if h != alone]
        await self._cut([(alone, h) for h in others], f"cut {alone} off")

    async def _cut_plane(self) -> None:
        host = f"host-plane-{self._plane()}"
        if self._rng.random() < 0.5:
            await self._cut([(host, ETCD)], f"cut {host} from etcd")
        else:
            others = [h for h in self._cluster.hosts() if h != host]
            await self._cut([(host, h) for h in others], f"cut {host} off")

    async def _cut(self, pairs: list[tuple[str, str]], text: str) -> None:
        seconds = self._rng.choice([0.05, 0.3, 1.0, 4.0, 8.0])
        self._log_fault(f"{text} for {seconds} s")
        for a, b in pairs:
            self._cluster.sever(a, b)
        await asyncio.sleep(seconds)
        for a, b in pairs:
            self._cluster.reconnect(a, b)

    # Control planes and etcd.

    def _plane(self) -> int:
        return self._rng.randrange(self._cluster.sizes.num_control_planes)

    async def _kill_plane(self) -> None:
        await self._kill_planes([self._plane()])

    async def _lose_planes(self) -> None:
        await self._kill_planes(list(range(self._cluster.sizes.num_control_planes)))

    async def _kill_planes(self, numbers: list[int]) -> None:
        self._log_fault(f"kill control planes {numbers}")
        for number in numbers:
            self._cluster.kill_control_plane(number)
        await asyncio.sleep(self._rng.uniform(0.1, 1.0))
        for number in numbers:
            self._cluster.start_control_plane(number)

    async def _lose_etcd(self) -> None:
        seconds = self._rng.choice([0.1, 1.0, 3.0, 7.0, 12.0])
        hosts = [h for h in self._cluster.hosts() if h != ETCD]
        self._log_fault(f"lose {ETCD} for {seconds} s")
        for host in hosts:
            self._cluster.sever(host, ETCD)
        await asyncio.sleep(seconds)
        for host in hosts:
            self._cluster.reconnect(host, ETCD)
