"""What can happen to ranks on cards in addition: calls into the driver that stand still, hosts that
are paused or starved, neighbours that take others with them, and verdicts that come late."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from tests.sim.cluster import SimCluster
from tests.sim.sim_loop import SimProcess, begin_stall, end_stall, resume

Fault = Callable[[], Awaitable[None]]

SHORT_S = (0.05, 0.2, 0.41, 0.9)
STARVED_S = (0.02, 0.1)
WAIT_FOR_MOMENT_S = 3.0


class CardFaults:
    """`harmless`: no life may end by these, save by a stop of all ranks."""

    def __init__(
        self,
        cluster: SimCluster,
        rng: random.Random,
        log_fault: Callable[[str], None],
        *,
        is_harmless: bool,
    ) -> None:
        """`is_harmless`: of a schedule in which no rank may lose its life."""
        assert cluster.cards is not None
        self._cluster = cluster
        self._fabric = cluster.cards.fabric
        self._rng = rng
        self._log_fault = log_fault
        self._is_harmless = is_harmless

    def harmless(self) -> list[Fault]:
        if not self._fabric.sizes.has_pauses:
            return []
        return [
            self._stall_driver,
            self._stall_engine,
            self._starve,
            self._pause_host,
            self._stop_all_ranks,
        ]

    def harmful(self) -> list[Fault]:
        return [
            self._kill_some,
            self._kill_some,
            self._kill_with_neighbours,
            self._delay_map,
            self._delay_map,
            self._die_without_leader,
            self._kill_at_load,
            self._kill_at_load,
        ]

    def _rank(self) -> int:
        return self._rng.randrange(self._cluster.sizes.num_ranks)

    # Pauses.

    async def _stall_driver(self) -> None:
        """A call into the driver holds Python's lock."""
        rank, seconds = self._rank(), self._rng.choice(SHORT_S)
        self._log_fault(f"stall rank {rank} for {seconds} s")
        await self._stall([self._cluster.process_of(rank)], seconds)

    async def _stall_engine(self) -> None:
        """Alone: the event loop answers."""
        rank, seconds = self._rank(), self._rng.choice(SHORT_S)
        process = self._cluster.process_of(rank)
        if process is None:
            return
        self._log_fault(f"stall the engine of rank {rank} for {seconds} s")
        member = next(m for m, p in self._cluster.processes.items() if p is process)
        if (host := self._cluster.engine_executors.get(member)) is not None:
            host.stall(seconds)

    async def _starve(self) -> None:
        """It runs now and then for a moment."""
        rank = self._rank()
        self._log_fault(f"starve rank {rank}")
        until = self._cluster.clock.now() + self._rng.uniform(0.1, 1.0)
        while self._cluster.clock.now() < until:
            await self._stall([self._cluster.process_of(rank)], self._rng.uniform(*STARVED_S))
            await asyncio.sleep(self._rng.uniform(0.001, 0.01))

    async def _pause_host(self) -> None:
        """All its processes, its node agent included."""
        rank, seconds = self._rank(), self._rng.choice(SHORT_S)
        self._log_fault(f"pause {self._cluster.host_of_rank(rank)} for {seconds} s")
        agent = self._cluster.agent_processes[rank]
        await self._stall([self._cluster.process_of(rank), agent], seconds)

    async def _stop_all_ranks(self) -> None:
        """By SIGSTOP. Each is alone on its host, so no agent can tell that the others are stopped
        too: their verdicts are true, and no harmless schedule does it."""
        if self._is_harmless:
            return
        seconds = self._rng.choice(SHORT_S)
        self._log_fault(f"stop all ranks for {seconds} s")
        stopped = []
        for rank, agent in self._cluster.agents.items():
            process = self._cluster.process_of(rank)
            if process is not None and not process.stopped:
                agent.stop_rank()
                stopped.append(process)
        await asyncio.sleep(seconds)
        for process in stopped:
            if not process.dead:
                resume(process, self._cluster.loop)

    async def _stall(self, processes: Sequence[SimProcess | None], seconds: float) -> None:
        stalled = [p for p in processes if p is not None and not p.dead]
        for process in stalled:
            begin_stall(process, self._cluster.loop)
        await asyncio.sleep(seconds)
        for process in stalled:
            if not process.dead:
                end_stall(process, self._cluster.loop)

    # Deaths.

    async def _kill_some(self) -> None:
        """All but one at most, within a moment."""
        num_ranks = self._cluster.sizes.num_ranks
        victims = self._rng.sample(range(num_ranks), self._rng.randint(1, num_ranks - 1))
        within_s = self._rng.choice([0.0, 0.01, 0.05, 0.3])
        self._log_fault(f"kill ranks {victims} within {within_s} s")
        for rank in victims:
            self._cluster.kill_rank(rank)
            await asyncio.sleep(self._rng.uniform(0.0, within_s / len(victims)))

    async def _kill_with_neighbours(self) -> None:
        """Processes that share a card through one context lose it together."""
        rank = self._rank()
        self._log_fault(f"kill rank {rank} and the contexts of its card")
        process = self._cluster.process_of(rank)
        card = self._fabric.card_of(rank)  # type: ignore[arg-type]
        neighbours = [d.process for d in card.devices if d.process is not process]
        self._cluster.kill_rank(rank)
        for each in neighbours:
            await asyncio.sleep(self._rng.uniform(0.0, 0.2 / len(neighbours)))
            each.device_failed = True

    async def _delay_map(self) -> None:
        """A death while no map can be published. Kernels wait for the dead rank until their
        timeout, and the graphs behind them as long again for who has launched none."""
        away_s = 2 * self._fabric.sizes.graph_timeout_s + self._rng.uniform(0.05, 0.4)
        rank = self._rank()
        await self._until_busy()
        self._log_fault(f"kill rank {rank}, and stall control planes for {away_s:.2f} s")
        self._cluster.kill_rank(rank)
        await self._stall(self._cluster.control_planes, away_s)

    async def _until_busy(self) -> None:
        """Until some rank runs a session: the others have no graph to launch ahead."""
        until = self._cluster.clock.now() + WAIT_FOR_MOMENT_S
        while not any(d.queue for d in self._fabric.devices.values()):
            if self._cluster.clock.now() > until:
                return
            await asyncio.sleep(0.001)

    async def _die_without_leader(self) -> None:
        """A death, and control planes that come back with nothing but what etcd says."""
        away_s = self._fabric.sizes.graph_timeout_s + self._rng.uniform(0.1, 1.0)
        rank = self._rank()
        self._log_fault(f"kill rank {rank}, and control planes for {away_s:.2f} s")
        planes = range(self._cluster.sizes.num_control_planes)
        for number in planes:
            self._cluster.kill_control_plane(number)
        self._cluster.kill_rank(rank)
        await asyncio.sleep(away_s)
        for number in planes:
            self._cluster.start_control_plane(number)

    async def _kill_at_load(self) -> None:
        """While experts are loaded somewhere."""
        loads = self._num_loads()
        until = self._cluster.clock.now() + WAIT_FOR_MOMENT_S
        while self._num_loads() == loads:
            if self._cluster.clock.now() > until:
                return
            await asyncio.sleep(0.001)
        rank = self._rank()
        self._log_fault(f"kill rank {rank} as experts are loaded")
        self._cluster.kill_rank(rank)

    def _num_loads(self) -> int:
        return sum(d.slots.counts.num_loads for d in self._fabric.devices.values())
