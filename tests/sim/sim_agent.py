"""A node agent of the simulated cluster: the real one's decisions and exit reports, on processes
that it starts and watches without a kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable

from node_agent.desired_ranks import DesiredRanks
from node_agent.exit_report import ExitReporter
from node_agent.lease_keeper import keep_lease_until_registered
from node_agent.process_view import ProcessSample
from node_agent.rank_supervisor import (
    Kill,
    RankSupervisor,
    RevokeLease,
    RunningRank,
    Spawn,
    SupervisorAction,
    Terminate,
)
from node_agent.restart_policy import RestartPolicy
from node_agent.serving_view import ServingView
from node_agent.view_reporter import ViewReporter
from shared.changes import changes
from shared.clock import Clock
from shared.errors import StoreError
from shared.incarnations import allocate_incarnation
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import AgentRecord, Verdict, pack_record
from shared.store import Store
from shared.types import Member, NodeId, RankId
from tests.sim.sim_loop import SimLoop, SimProcess, kill, resume, stop

VERDICT_GRACE_S = 2.0
EXIT_SEEN_S = (0.001, 0.005)
KILLED = -signal.SIGKILL

Spawner = Callable[[Member, int, str], SimProcess]
"""Takes the member, its lease, and the host."""


class SimAgent:
    """Runs one rank at most, apart from one that is about to leave: the one of its flags, or that
    which the desired state places here. `run` never ends."""

    def __init__(
        self,
        *,
        ranks: tuple[RankId, ...],
        node: str,
        store: Store,
        keys: Keys,
        clock: Clock,
        lease_ttl_s: float,
        spawn: Spawner,
        rng: random.Random,
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._lease_ttl_s = lease_ttl_s
        self._spawn = spawn
        self._rng = rng
        self.process: SimProcess | None = None  # the newest
        self._processes: dict[RankId, SimProcess] = {}
        record = AgentRecord(node=NodeId(node), pid=1, ranks=ranks, ranks_max=1)
        self._leased = LeasedKeys(store, ttl_s=lease_ttl_s)
        self._leased.put(keys.agent(record.node), pack_record(record))
        self._exit_reporter = ExitReporter(store, keys, NodeId(node), clock)
        self._desired_ranks = DesiredRanks(node=NodeId(node), flag_ranks=ranks)
        self._view = ServingView(keys=keys)
        self._supervisor = RankSupervisor(
            [],
            RestartPolicy(delay_s_max=2.0),
            rng,
            clock.now(),
            verdict_grace_s=VERDICT_GRACE_S,
            stop_grace_s=VERDICT_GRACE_S,
        )
        self._changed = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._stopped = asyncio.Queue[tuple[RunningRank, bool]]()
        self._view_reporter = ViewReporter(
            store=store,
            keys=keys,
            clock=clock,
            leased=self._leased,
            alive=self._supervisor.alive,
            sample=self._sample,
            gap_tick_s=0.25,
        )
        self._num_samples = 0

    @property
    def member(self) -> Member | None:
        """The incarnation that runs, as far as the agent knows."""
        return next((running.member for running in self._supervisor.running()), None)

    async def run(self) -> None:
        async with self._tasks:
            self._tasks.create_task(self._leased.run())
            self._tasks.create_task(self._watch_serving())
            self._tasks.create_task(self._report_stopped())
            self._tasks.create_task(self._view_reporter.run())
            while True:
                self._perform(self._supervisor.take_due(self._clock.now()))
                await self._wait()

    def stop_rank(self) -> None:
        """SIGSTOP, which the real agent learns of by SIGCHLD."""
        assert self.process is not None
        stop(self.process)
        self._on_child_signal(stopped=True)

    def continue_rank(self, process: SimProcess, loop: SimLoop) -> None:
        """SIGCONT. `process` may be of an incarnation that has ended meanwhile."""
        resume(process, loop)
        if process is self.process:
            self._on_child_signal(stopped=False)

    def _on_child_signal(self, *, stopped: bool) -> None:
        for running_rank in self._supervisor.running():
            self._stopped.put_nowait((running_rank, stopped))

    def _sample(self, pid: int) -> ProcessSample:
        """What the kernel would say: a simulated process runs unless it is stopped."""
        if self.process is None or self.process.dead:
            raise ProcessLookupError(pid)
        self._num_samples += 1
        return ProcessSample(
            is_stopped=self.process.stopped,
            is_runnable=False,
            cpu_ticks=0,
            run_ns=self._num_samples,
            wait_ns=0,
        )

    async def _report_stopped(self) -> None:
        while True:
            running_rank, stopped = await self._stopped.get()
            await asyncio.sleep(self._rng.uniform(*EXIT_SEEN_S))
            self._view_reporter.report_stopped(running_rank, stopped=stopped)

    async def _watch_serving(self) -> None:
        async with contextlib.aclosing(changes(self._store, self._keys.serving)) as watch:
            async for seen in watch:
                for each in self._view.apply(seen):
                    if isinstance(each, Verdict):
                        member = each.member
                        self._perform(self._supervisor.on_declared_dead(member, self._clock.now()))
                    elif each.node == self._desired_ranks.node and self._supervisor.owns(each.rank):
                        registered = RunningRank(
                            member=each.member, lease_id=each.lease_id, pid=each.pid
                        )
                        self._perform(self._supervisor.on_registered(registered))
                self._follow_orders()
                self._changed.set()

    def _follow_orders(self) -> None:
        running, now = self._supervisor.processes(), self._clock.now()
        orders = self._desired_ranks.orders(self._view, running)
        if orders is None:
            return
        self._supervisor.want(orders.wanted, now)
        self._perform(self._supervisor.stop_unwanted(orders.wanted, orders.ended, now))
        for rank in orders.restarted:
            self._perform(self._supervisor.replace(rank, now))

    async def _wait(self) -> None:
        due_at = self._supervisor.next_due_at()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due_at is None else due_at - self._clock.now()):
                await self._changed.wait()
        self._changed.clear()

    def _perform(self, actions: list[SupervisorAction]) -> None:
        for action in actions:
            match action:
                case Spawn(rank=rank):
                    self._tasks.create_task(self._run_rank(rank))
                case RevokeLease(running_rank=running_rank, exit_code=exit_code):
                    self._view_reporter.forget(running_rank.member)
                    self._tasks.create_task(
                        self._exit_reporter.revoke_and_report(
                            running_rank, exit_code, agent_lease_id=self._lease_id
                        )
                    )
                case Kill(running_rank=running_rank) | Terminate(running_rank=running_rank):
                    kill(self._processes[running_rank.member.rank])

    async def _run_rank(self, rank: RankId) -> None:
        try:
            member, lease_id = await allocate_incarnation(
                self._store, self._keys, rank, self._lease_ttl_s
            )
        except StoreError:
            self._perform(self._supervisor.on_spawn_failed(rank, self._clock.now()))
            self._changed.set()
            return
        process = self._spawn(member, lease_id, self._desired_ranks.node)
        exited = asyncio.Event()
        process.on_death.append(exited.set)
        self.process = self._processes[rank] = process
        running_rank = RunningRank(member=member, lease_id=lease_id, pid=os.getpid())
        self._perform(self._supervisor.on_spawned(running_rank, self._clock.now()))
        async with self._keeping_lease(running_rank):
            await exited.wait()
            await asyncio.sleep(self._rng.uniform(*EXIT_SEEN_S))
        exit_code = KILLED if process.exit_code is None else process.exit_code
        self._perform(self._supervisor.on_exited(rank, exit_code, self._clock.now()))
        self._follow_orders()
        self._changed.set()

    @contextlib.asynccontextmanager
    async def _keeping_lease(self, running_rank: RunningRank) -> AsyncIterator[None]:
        lease_task = self._tasks.create_task(
            keep_lease_until_registered(
                self._store,
                self._keys,
                running_rank.member,
                running_rank.lease_id,
                self._lease_ttl_s,
            )
        )
        try:
            yield
        finally:
            lease_task.cancel()

    def _lease_id(self) -> int:
        return self._leased.lease_id
