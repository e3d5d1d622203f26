"""What people may ask of an instance while it serves, drawn from a schedule's seed: scale, drain,
undrain, replace, restart, pause, rebalance, and SIGTERM to a rank."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from control_plane.control_driver import Driver
from control_plane.desired_changes import (
    Change,
    DrainRanks,
    PauseVerdicts,
    Rebalance,
    Refusal,
    Replace,
    RestartRanks,
    ResumeVerdicts,
    Scale,
    Undrain,
)
from shared.desired_state import DesiredState
from shared.errors import StoreUnavailable, Unavailable
from shared.records import unpack_record
from shared.types import NodeId, RankId
from tests.sim.cluster import SimCluster
from tests.sim.sim_loop import SimProcess

ANSWER_S = 3.0
LOOK_S = 0.01
RETRY_S = 0.3
PATIENCE_S = 60.0
LEAVE_GRACE_S = 60.0


class Changes:
    """Draws changes from the seed and asks for them; `done` says what and when."""

    def __init__(self, cluster: SimCluster, within_s: float) -> None:
        self._cluster = cluster
        self._rng = random.Random(cluster.seed * 15485863 + 3)
        self._within_s = within_s
        self._num_asked = 0
        self.done: list[str] = []
        self.has_hurried = False  # told a process to leave that was leaving

    @property
    def desired(self) -> DesiredState:
        """What etcd holds."""
        found = self._cluster.etcd.values.get(self._cluster.keys.desired)
        return DesiredState() if found is None else unpack_record(found.value, DesiredState)

    async def run(self) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [
            self._scale,
            self._scale,
            self._drain,
            self._drain,
            self._undrain,
            self._replace,
            self._restart,
            self._pause,
            self._rebalance,
            self._tell_to_leave,
        ]
        for _ in range(self._rng.randint(1, 4)):
            await asyncio.sleep(self._rng.uniform(0.0, self._within_s / 2))
            await self._rng.choice(kinds)()

    async def end(self) -> None:
        """Takes back what would keep ranks out, or the dead in."""
        await self.ask(ResumeVerdicts())
        for rank in [drain.rank for drain in self.desired.drains]:
            # Refused if its place is another one's by now: then it moves.
            await self.ask(Undrain(ranks=(rank,)))

    async def ask(self, change: Change) -> None:
        """Again and again until somebody has answered: the request id makes that harmless. Raises
        TimeoutError if nobody does for PATIENCE_S, or what `SimCluster.check` raises."""
        self._num_asked += 1
        request_id = f"request-{self._num_asked}"
        deadline = self._cluster.clock.now() + PATIENCE_S
        while self._cluster.clock.now() < deadline:
            self._cluster.check()
            for process, driver in list(self._cluster.drivers.items()):
                if process.dead or not driver.leads:
                    continue
                answer = await self._answer(process, driver, change, request_id)
                if answer is not None:
                    self._log(f"{change} -> {answer.text if isinstance(answer, Refusal) else 'ok'}")
                    return
            await asyncio.sleep(RETRY_S)
        raise TimeoutError(f"nobody answered {change}: {self._cluster.describe()}")

    async def _answer(
        self, process: SimProcess, driver: Driver, change: Change, request_id: str
    ) -> DesiredState | Refusal | None:
        """None if the process has died, does not lead, or etcd was silent."""
        answers: list[DesiredState | Refusal | None] = []

        async def ask() -> None:
            try:
                answers.append(await driver.change(change, request_id=request_id))
            except (Unavailable, StoreUnavailable):
                answers.append(None)

        self._cluster.spawn(ask(), process)
        for _ in range(round(ANSWER_S / LOOK_S)):
            if answers or process.dead:
                break
            await asyncio.sleep(LOOK_S)
        return answers[0] if answers else None

    def _log(self, text: str) -> None:
        self.done.append(f"{self._cluster.clock.now() - 1000:.3f} {text}")

    def _ranks(self) -> list[RankId]:
        return list(self.desired.rank_ids(self._cluster.sizes.num_ranks))

    def _grace_s(self) -> float:
        return self._rng.choice([0.0, 0.3, 2.0])

    async def _scale(self) -> None:
        sizes = self._cluster.sizes
        num_ranks = self._rng.randint(max(1, sizes.num_ranks - 2), sizes.num_hosts + 1)
        await self.ask(Scale(num_ranks=num_ranks, grace_s=self._grace_s()))

    async def _drain(self) -> None:
        some = self._rng.sample(self._ranks(), min(len(self._ranks()), self._rng.randint(1, 2)))
        await self.ask(DrainRanks(ranks=tuple(some), grace_s=self._grace_s()))

    async def _undrain(self) -> None:
        drained = tuple(drain.rank for drain in self.desired.drains)
        await self.ask(Undrain(ranks=drained or (self._ranks()[0],)))

    async def _replace(self) -> None:
        host = self._rng.choice(self._cluster.hosts()[: self._cluster.sizes.num_hosts])
        rank = self._rng.choice(self._ranks())
        await self.ask(Replace(rank=rank, node=NodeId(host), grace_s=self._grace_s()))

    async def _restart(self) -> None:
        some = self._rng.sample(self._ranks(), min(len(self._ranks()), self._rng.randint(1, 2)))
        await self.ask(RestartRanks(ranks=tuple(some), grace_s=self._grace_s()))

    async def _pause(self) -> None:
        await self.ask(PauseVerdicts())
        await asyncio.sleep(self._rng.uniform(0.2, 2.0))
        await self.ask(ResumeVerdicts())

    async def _rebalance(self) -> None:
        await self.ask(Rebalance())

    async def _tell_to_leave(self) -> None:
        """SIGTERM. A second one ends the process at once."""
        host = self._rng.randrange(self._cluster.sizes.num_hosts)
        process = self._cluster.process_of(host)
        rank = next(
            (r for m, r in self._cluster.ranks.items() if self._cluster.processes[m] is process),
            None,
        )
        if process is None or rank is None:
            return
        self._log(f"SIGTERM to {rank.member}")
        told, now = self._cluster.told_to_leave, self._cluster.clock.now()
        self.has_hurried |= process in told
        told[process] = now if process in told else now + LEAVE_GRACE_S
        self._cluster.run_in(process, lambda: rank.leave(LEAVE_GRACE_S))
