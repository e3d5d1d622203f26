"""A node agent of the simulated world: the real one's decisions and testimony, on processes that it
starts and watches without a kernel."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Callable

from node_agent.exit_report import Obituary
from node_agent.lease_keeper import nurse_lease
from node_agent.rank_supervisor import Action, Bury, Kill, Life, RankLives, Spawn
from node_agent.restart_policy import RespawnPolicy
from shared.clock import Clock
from shared.errors import StoreError
from shared.incarnations import new_life
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import AgentRecord, Verdict, pack_record, unpack_record
from shared.store import Snapshot, Store
from shared.types import Member, NodeId, RankId
from tests.sim.sim_loop import SimProcess, kill, stop

CONDEMNED_GRACE_S = 2.0
EXIT_SEEN_S = (0.001, 0.005)
KILLED = -signal.SIGKILL

Spawner = Callable[[Member, int], SimProcess]


class SimAgent:
    """Owns one rank. `run` never ends."""

    def __init__(
        self,
        *,
        rank: RankId,
        node: str,
        store: Store,
        keys: Keys,
        clock: Clock,
        lease_ttl_s: float,
        spawn: Spawner,
        draw: random.Random,
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._lease_ttl_s = lease_ttl_s
        self._spawn = spawn
        self._draw = draw
        self.process: SimProcess | None = None
        self.member: Member | None = None
        record = AgentRecord(node=NodeId(node), pid=1, ranks=(rank,))
        self._leased = LeasedKeys(store, ttl_s=lease_ttl_s)
        self._leased.put(keys.agent(record.node), pack_record(record))
        self._obituary = Obituary(store, keys, NodeId(node), clock)
        self._lives = RankLives(
            [rank],
            RespawnPolicy(delay_s_max=2.0),
            draw,
            clock.now(),
            condemned_grace_s=CONDEMNED_GRACE_S,
        )
        self._changed = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._stopped = asyncio.Queue[Life]()

    async def run(self) -> None:
        async with self._tasks:
            self._tasks.create_task(self._leased.run())
            self._tasks.create_task(self._watch_verdicts())
            self._tasks.create_task(self._report_stopped())
            while True:
                self._perform(self._lives.due(self._clock.now()))
                await self._wait()

    def stop_rank(self) -> None:
        """SIGSTOP, which the real agent learns of by SIGCHLD."""
        assert self.process is not None
        stop(self.process)
        for life in self._lives.running():
            self._stopped.put_nowait(life)

    async def _report_stopped(self) -> None:
        while True:
            life = await self._stopped.get()
            await asyncio.sleep(self._draw.uniform(*EXIT_SEEN_S))
            await self._obituary.report_stopped(life, agent_lease_id=self._lease_id)

    async def _watch_verdicts(self) -> None:
        async with contextlib.aclosing(self._store.watch(self._keys.verdicts)) as watch:
            async for seen in watch:
                for each in seen.values if isinstance(seen, Snapshot) else (seen,):
                    if each.value is not None:
                        verdict = unpack_record(each.value, Verdict)
                        member = Member(rank=verdict.rank, incarnation=verdict.incarnation)
                        self._perform(self._lives.condemned(member, self._clock.now()))
                self._changed.set()

    async def _wait(self) -> None:
        due_at = self._lives.next_due_at()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due_at is None else due_at - self._clock.now()):
                await self._changed.wait()
        self._changed.clear()

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(rank=rank):
                    self._tasks.create_task(self._live(rank))
                case Bury(life=life, exit_code=exit_code):
                    self._tasks.create_task(
                        self._obituary.publish(life, exit_code, agent_lease_id=self._lease_id)
                    )
                case Kill():
                    assert self.process is not None
                    kill(self.process)

    async def _live(self, rank: RankId) -> None:
        try:
            member, lease_id = await new_life(self._store, self._keys, rank, self._lease_ttl_s)
        except StoreError:
            self._perform(self._lives.spawn_failed(rank, self._clock.now()))
            self._changed.set()
            return
        process = self._spawn(member, lease_id)
        exited = asyncio.Event()
        process.on_death.append(exited.set)
        self.process, self.member = process, member
        life = Life(member=member, lease_id=lease_id, pid=1)
        self._perform(self._lives.spawned(life, self._clock.now()))
        async with self._nursing(life):
            await exited.wait()
            await asyncio.sleep(self._draw.uniform(*EXIT_SEEN_S))
        exit_code = KILLED if process.exit_code is None else process.exit_code
        self._perform(self._lives.exited(rank, exit_code, self._clock.now()))
        self._changed.set()

    @contextlib.asynccontextmanager
    async def _nursing(self, life: Life) -> AsyncIterator[None]:
        nurse = self._tasks.create_task(
            nurse_lease(self._store, self._keys, life, self._lease_ttl_s)
        )
        try:
            yield
        finally:
            nurse.cancel()

    def _lease_id(self) -> int:
        return self._leased.lease_id
