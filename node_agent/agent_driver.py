"""Performs what `RankSupervisor` decides: starts processes, watches their pidfds, writes to etcd.
Trouble with etcd never makes it stop a rank that serves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from node_agent.cards import Cards
from node_agent.cpu_pinning import CpuPinning
from node_agent.desired_ranks import DesiredRanks
from node_agent.exit_report import ExitReporter, retry_until_done
from node_agent.fork_client import ForkClient, ForkUnavailable
from node_agent.lease_keeper import keep_lease_until_registered
from node_agent.metrics import AgentMetrics
from node_agent.own_record import OwnRecord, why_it_ended
from node_agent.rank_process import (
    RankCommand,
    RankProcess,
    adopt_fork,
    command_line_of,
    find_running,
    reap_orphans,
    spawn,
)
from node_agent.rank_supervisor import (
    Kill,
    RankSupervisor,
    RevokeLease,
    RunningRank,
    Spawn,
    SupervisorAction,
    Terminate,
)
from node_agent.serving_view import ServingView
from node_agent.view_reporter import ViewReporter
from shared.changes import changes
from shared.clock import Clock
from shared.errors import StoreError, StoreUnavailable
from shared.exit_codes import END_AT_ONCE, EXIT_FENCED, describe_exit
from shared.incarnations import allocate_incarnation
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import RankRecord, Verdict, unpack_record
from shared.store import Store
from shared.types import Member, RankId

log = structlog.get_logger()

_FINAL_WRITES_TIMEOUT_S = 1.0
_ENDED_FROM_OUTSIDE = frozenset(
    {0, EXIT_FENCED, -signal.SIGKILL, -signal.SIGTERM, -END_AT_ONCE, None}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSetup:
    """How this node's ranks are started."""

    command: RankCommand
    environment: Mapping[str, str]
    log_dir: Path | None
    lease_ttl_s: float
    stop_grace_s: float
    dying_poll_s: float  # interval of the search for processes that have begun to exit; 0: none
    cpus: Sequence[int] = ()  # that ranks share, each pinned to its part; empty: none is pinned
    leave_grace_s: float = 0.0  # for ranks to be drained, if the agent is told to end
    fork_server: tuple[str, ...] = ()  # its program; empty: there is none


@dataclass(slots=True, kw_only=True)
class AgentDriver:
    """`run` ends after `stop` or `leave` was called and every rank has exited."""

    store: Store
    keys: Keys
    supervisor: RankSupervisor
    desired_ranks: DesiredRanks
    own_record: OwnRecord
    leased: LeasedKeys
    exit_reporter: ExitReporter
    view_reporter: ViewReporter
    setup: RankSetup
    clock: Clock
    fork_client: ForkClient | None  # None: every rank is started by `exec`
    metrics: AgentMetrics
    cards: Cards
    _processes: dict[RankId, RankProcess] = field(default_factory=dict)
    _lease_tasks: dict[RankId, asyncio.Task[None]] = field(default_factory=dict)
    _crashed_forks: set[RankId] = field(default_factory=set)
    _revocations: set[asyncio.Task[None]] = field(default_factory=set)
    _pinning: CpuPinning = field(init=False)
    _view: ServingView = field(init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: asyncio.TaskGroup = field(default_factory=asyncio.TaskGroup)
    _stopping: bool = False

    def __post_init__(self) -> None:
        self._view = ServingView(keys=self.keys)
        self._pinning = CpuPinning(cpus=self.setup.cpus, processes=self._processes)

    async def run(self) -> None:
        async with self._tasks:
            self._adopt()
            leased_keys_task = self._tasks.create_task(self.leased.run())
            serving_watcher = self._tasks.create_task(self._watch_serving())
            exit_poller = self._tasks.create_task(self._poll_for_exits())
            view_reports = self._tasks.create_task(self.view_reporter.run())
            asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._on_child_changed)
            fork_server_keepers = []
            if self.fork_client is not None:
                self.fork_client.start()
                fork_server_keepers = [self._tasks.create_task(self.fork_client.keep_ready())]
            while not (self._stopping and self.supervisor.all_stopped):
                self._perform(self.supervisor.take_due(self.clock.now()))
                await self._wait()
            if self.fork_client is not None:
                self.fork_client.close()
            if self._revocations:
                await asyncio.wait(self._revocations, timeout=_FINAL_WRITES_TIMEOUT_S)
            for task in (
                leased_keys_task,
                serving_watcher,
                exit_poller,
                view_reports,
                *fork_server_keepers,
                *self._revocations,
            ):
                task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FINAL_WRITES_TIMEOUT_S):
                await self.leased.release()

    def leave(self) -> None:
        """Has all ranks drained, then ends them. They end at once if nobody can take over, after
        the grace time, or at the second call."""
        grace_s, desired = self.setup.leave_grace_s, self.desired_ranks
        if grace_s <= 0 or desired.is_leaving or desired.is_alone(self._view):
            self.stop()
            return
        log.info("leaving", ranks=len(self.supervisor.running()), grace_s=grace_s)
        desired.is_leaving = True
        self.own_record.leave()
        asyncio.get_running_loop().call_later(grace_s, self.stop)
        self._follow_orders()

    def stop(self, *, grace_s: float | None = None) -> None:
        """Tells all ranks to end at once, and sends SIGKILL after the grace time. A later call can
        only shorten it."""
        first, self._stopping = not self._stopping, True
        if first:
            log.info("stopping", ranks=len(self.supervisor.running()))
            self._perform(self.supervisor.stop())
            if self.fork_client is not None:
                self.fork_client.close()
        grace_s = self.setup.stop_grace_s if grace_s is None else grace_s
        asyncio.get_running_loop().call_later(grace_s, self._kill_all)
        self._changed.set()

    def _kill_all(self) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGKILL)

    def _adopt(self) -> None:
        """Adopts the ranks that run already."""
        for running_rank, process in find_running(self.setup.command):
            rank = running_rank.member.rank
            if self.supervisor.owns(rank):  # by a later incarnation
                log.warning(
                    "stray_rank_killed", member=str(running_rank.member), pid=running_rank.pid
                )
                process.send_signal(signal.SIGKILL)
                process.close()
                continue
            self.supervisor.want([rank], self.clock.now())
            log.info("process_adopted", member=str(running_rank.member), pid=running_rank.pid)
            self._keep_lease(running_rank.member, running_rank.lease_id)
            self.cards.adopt(rank, command_line_of(running_rank.pid))
            self._track(running_rank, process)
            self._perform(self.supervisor.on_adopted(running_rank, self.clock.now()))

    async def _revoke_stale_leases(self) -> None:
        """Revokes the leases of this node's ranks that died while no agent ran. A process that runs
        is known by its pid: its incarnation may be a later one than that of its command line."""
        registered = await self.store.get_prefix(self.keys.ranks)
        running = {(each.member.rank, each.pid) for each in self.supervisor.running()}
        for kv in registered.values:
            record = unpack_record(kv.value, RankRecord)
            if self._owns(record) and (record.rank, record.pid) not in running:
                log.info("stale_lease_found", member=str(record.member))
                await self.store.revoke_lease(record.lease_id)

    def _owns(self, record: RankRecord) -> bool:
        return record.node == self.setup.command.node and self.supervisor.owns(record.rank)

    async def _watch_serving(self) -> None:
        """Learns under which incarnation and lease a rank's process runs, which are declared dead,
        and what shall run here."""
        async for seen in changes(self.store, self.keys.serving):
            is_first = not self._view.synced
            for each in self._view.apply(seen):
                if isinstance(each, Verdict):
                    self._perform(self.supervisor.on_declared_dead(each.member, self.clock.now()))
                elif self._owns(each):
                    self.metrics.on_record(each)
                    self.own_record.on_gone(each.rank)
                    registered = RunningRank(
                        member=each.member, lease_id=each.lease_id, pid=each.pid
                    )
                    self._perform(self.supervisor.on_registered(registered))
            self._follow_orders()
            self._changed.set()
            if is_first:
                revocation = self._tasks.create_task(retry_until_done(self._revoke_stale_leases))
                self._revocations.add(revocation)
                revocation.add_done_callback(self._revocations.discard)

    def _follow_orders(self) -> None:
        running = self.supervisor.processes()
        orders = self.desired_ranks.orders(self._view, running)
        if orders is None or self._stopping:
            return
        now = self.clock.now()
        self.supervisor.want(orders.wanted, now)
        self.own_record.on_wanted(orders.wanted)
        self._perform(self.supervisor.stop_unwanted(orders.wanted, orders.ended, now))
        for rank in orders.restarted:
            self._perform(self.supervisor.replace(rank, now))
        if self.desired_ranks.is_leaving and self.supervisor.all_stopped:
            self.stop()
        self._pinning.share(orders.wanted)

    async def _poll_for_exits(self) -> None:
        """Finds exits early: a pidfd fires only after the kernel has torn the process down, which
        may take long."""
        poll_s = self.setup.dying_poll_s
        while poll_s > 0:
            await asyncio.sleep(poll_s)
            for running_rank in self.supervisor.alive():
                rank = running_rank.member.rank
                seen = self._processes[rank].read_dying()
                if seen is not None:
                    log.info("rank_dying", member=str(running_rank.member), pid=running_rank.pid)
                    self._perform(self.supervisor.on_dying(rank, seen.exit_code))

    def _on_child_changed(self) -> None:
        """On SIGCHLD: a child has exited (its pidfd reports that), was stopped, or was
        continued."""
        self._reap_orphans()
        for running_rank in self.supervisor.running():
            process = self._processes.get(running_rank.member.rank)
            stopped = None if process is None else process.poll_stopped()
            if stopped is not None:
                self.view_reporter.report_stopped(running_rank, stopped=stopped)

    def _reap_orphans(self) -> None:
        if self.fork_client is None or self.fork_client.is_forking:
            return  # a dead child may be the rank that is being forked
        own = {process.pid for process in self._processes.values()}
        reap_orphans(own | {self.fork_client.pid or 0})

    async def _wait(self) -> None:
        """Waits until something has changed or a rank is due."""
        due_at = self.supervisor.next_due_at()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due_at is None else due_at - self.clock.now()):
                await self._changed.wait()
        self._changed.clear()

    def _perform(self, actions: list[SupervisorAction]) -> None:
        for action in actions:
            match action:
                case RevokeLease(running_rank=running_rank, exit_code=exit_code):
                    self._revoke_lease(running_rank, exit_code)
                case Spawn(rank=rank):
                    self._tasks.create_task(self._spawn(rank))
                case Terminate(running_rank=running_rank):
                    self._processes[running_rank.member.rank].send_signal(END_AT_ONCE)
                case Kill(running_rank=running_rank):
                    log.warning(
                        "rank_killed",
                        member=str(running_rank.member),
                        pid=running_rank.pid,
                    )
                    self._processes[running_rank.member.rank].send_signal(signal.SIGKILL)

    async def _spawn(self, rank: RankId) -> None:
        lease_id = 0
        try:
            member, lease_id = await allocate_incarnation(
                self.store,
                self.keys,
                rank,
                self.setup.lease_ttl_s,
                above=self.supervisor.last_incarnation(rank),
            )
            self._keep_lease(member, lease_id)
            process = await self._start(member, lease_id)
        except (StoreError, OSError) as error:
            log.error("spawn_failed", rank=rank, detail=str(error))
            if lease_id:
                self._lease_tasks.pop(rank).cancel()
                with contextlib.suppress(StoreUnavailable):
                    await self.store.revoke_lease(lease_id)
            self._perform(self.supervisor.on_spawn_failed(rank, self.clock.now()))
            why = f"no process could be started: {error}"
            self.own_record.on_waits(rank, self.supervisor.wait_of(rank), why)
            self._changed.set()
            return
        running_rank = RunningRank(member=member, lease_id=lease_id, pid=process.pid)
        log.info("rank_started", member=str(member), pid=process.pid, forked=process.is_forked)
        self.metrics.on_started(is_forked=process.is_forked)
        self._track(running_rank, process)
        self._perform(self.supervisor.on_spawned(running_rank, self.clock.now()))

    async def _start(self, member: Member, lease_id: int) -> RankProcess:
        command, log_path = self.setup.command, self._log_of(member.rank)
        argv = command.argv(member, lease_id, self.cards.take(member.rank))
        cpus = self._pinning.of(member.rank)
        if self.fork_client is not None and member.rank not in self._crashed_forks:
            try:
                pid = await self.fork_client.fork(argv, log_path)
                return adopt_fork(pid, cpus)
            except ForkUnavailable as error:
                log.warning("rank_not_forked", member=str(member), detail=str(error))
        self._crashed_forks.discard(member.rank)
        return spawn(
            argv,
            environment=self.setup.environment,
            pass_fds=command.shared_fds,
            log_path=log_path,
            cpus=cpus,
        )

    def _log_of(self, rank: RankId) -> Path | None:
        log_dir = self.setup.log_dir
        return None if log_dir is None else log_dir / f"rank-{rank}.log"

    def _track(self, running_rank: RunningRank, process: RankProcess) -> None:
        rank = running_rank.member.rank
        self._processes[rank] = process
        asyncio.get_running_loop().add_reader(process.fileno(), self._on_exited, rank)

    def _keep_lease(self, member: Member, lease_id: int) -> None:
        """From the grant on: a new fork server may take longer than the lease lasts."""
        self._lease_tasks[member.rank] = self._tasks.create_task(
            self._keep_lease_until_registered(member, lease_id)
        )

    async def _keep_lease_until_registered(self, member: Member, lease_id: int) -> None:
        await keep_lease_until_registered(
            self.store, self.keys, member, lease_id, self.setup.lease_ttl_s
        )
        self._pinning.pin_if_all_run()

    def _on_exited(self, rank: RankId) -> None:
        """On a pidfd: sends the revocation before anything else."""
        process = self._processes.pop(rank)
        self.cards.free(rank)
        asyncio.get_running_loop().remove_reader(process.fileno())
        exit_code = process.exit_code()
        process.close()
        self._perform(self.supervisor.on_exited(rank, exit_code, self.clock.now()))
        log.info("rank_exited", rank=rank, pid=process.pid, detail=describe_exit(exit_code))
        why = why_it_ended(exit_code, self._log_of(rank))
        self.own_record.on_waits(rank, self.supervisor.wait_of(rank), why)
        self.metrics.on_exit(exit_code)
        self._pinning.unpin()
        lease_task = self._lease_tasks.pop(rank)
        if process.is_forked and not lease_task.done() and exit_code not in _ENDED_FROM_OUTSIDE:
            self._crashed_forks.add(rank)  # perhaps only a new process can do what it could not
        lease_task.cancel()
        self._reap_orphans()
        self._follow_orders()
        self._changed.set()

    def _revoke_lease(self, running_rank: RunningRank, exit_code: int | None) -> None:
        self.view_reporter.forget(running_rank.member)
        revocation = self._tasks.create_task(
            self.exit_reporter.revoke_and_report(
                running_rank, exit_code, agent_lease_id=self._lease_id
            )
        )
        self._revocations.add(revocation)
        revocation.add_done_callback(self._revocations.discard)

    def _lease_id(self) -> int:
        return self.leased.lease_id
