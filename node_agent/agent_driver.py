"""Performs what `RankLives` decides: starts processes, listens on their pidfds, writes to etcd.
Ranks that serve are never touched for etcd's sake."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from node_agent.exit_report import Obituary, describe_exit, until_done
from node_agent.lease_keeper import nurse_lease
from node_agent.rank_process import RankCommand, RankProcess, find_running, spawn
from node_agent.rank_supervisor import (
    Action,
    Bury,
    Kill,
    Life,
    Phase,
    RankLives,
    Spawn,
    Terminate,
)
from shared.clock import Clock
from shared.errors import StoreError, StoreUnavailable
from shared.incarnations import new_life
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import RankRecord, Verdict, unpack_record
from shared.store import Snapshot, Store
from shared.types import Member, RankId

log = structlog.get_logger()

_LAST_WORDS_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSetup:
    """How this node's ranks are started."""

    command: RankCommand
    environment: Mapping[str, str]
    log_dir: Path | None
    lease_ttl_s: float
    stop_grace_s: float
    dying_poll_s: float  # how often to look for processes that have begun to die; 0: never
    cpus: Mapping[RankId, frozenset[int]] = field(default_factory=dict)  # of pinned ranks


@dataclass(slots=True, kw_only=True)
class AgentDriver:
    """`run` ends when `stop` was called and every rank has exited."""

    store: Store
    keys: Keys
    lives: RankLives
    leased: LeasedKeys
    obituary: Obituary
    setup: RankSetup
    clock: Clock
    _processes: dict[RankId, RankProcess] = field(default_factory=dict)
    _nurses: dict[RankId, asyncio.Task[None]] = field(default_factory=dict)
    _burials: set[asyncio.Task[None]] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: asyncio.TaskGroup = field(default_factory=asyncio.TaskGroup)
    _stopping: bool = False

    async def run(self) -> None:
        async with self._tasks:
            adopted = self._adopt()
            keeper = self._tasks.create_task(self.leased.run())
            sweeper = self._tasks.create_task(until_done(lambda: self._sweep(adopted)))
            executioner = self._tasks.create_task(self._watch_verdicts())
            lookout = self._tasks.create_task(self._look_for_dying())
            asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._look_for_stopped)
            while not self.lives.all_stopped:
                self._perform(self.lives.due(self.clock.now()))
                await self._wait()
            if self._burials:
                await asyncio.wait(self._burials, timeout=_LAST_WORDS_TIMEOUT_S)
            for task in (keeper, sweeper, executioner, lookout, *self._burials):
                task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                await self.leased.release()

    def stop(self, *, grace_s: float | None = None) -> None:
        """SIGTERM to all ranks, SIGKILL after the grace time. Later calls can only shorten it."""
        first, self._stopping = not self._stopping, True
        if first:
            log.info("stopping", ranks=len(self.lives.running()))
            self._perform(self.lives.stop())
        grace_s = self.setup.stop_grace_s if grace_s is None else grace_s
        asyncio.get_running_loop().call_later(grace_s, self._kill_all)
        self._changed.set()

    def _kill_all(self) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGKILL)

    def _adopt(self) -> set[Member]:
        """The members that run already."""
        adopted: set[Member] = set()
        for life, process in find_running(self.setup.command):
            rank = life.member.rank
            if not self.lives.owns(rank) or self.lives.phase_of(rank) is not Phase.WAITING:
                log.warning("stray_rank_killed", member=str(life.member), pid=life.pid)
                process.send_signal(signal.SIGKILL)
                process.close()
                continue
            log.info("rank_adopted", member=str(life.member), pid=life.pid)
            adopted.add(life.member)
            self._hold(life, process)
            self._perform(self.lives.adopted(life, self.clock.now()))
        return adopted

    async def _sweep(self, adopted: set[Member]) -> None:
        """Revokes the leases of this node's ranks that died while no agent watched."""
        standing = await self.store.get_prefix(self.keys.ranks)
        started = {life.member for life in self.lives.running()}
        for kv in standing.values:
            record = unpack_record(kv.value, RankRecord)
            ours = record.node == self.setup.command.node and self.lives.owns(record.rank)
            if ours and record.member not in adopted | started:
                log.info("rank_was_dead", member=str(record.member))
                await self.store.revoke_lease(record.lease_id)

    async def _watch_verdicts(self) -> None:
        async for seen in self.store.watch(self.keys.verdicts):
            values = seen.values if isinstance(seen, Snapshot) else (seen,)
            for each in values:
                if each.value is not None:
                    verdict = unpack_record(each.value, Verdict)
                    member = Member(rank=verdict.rank, incarnation=verdict.incarnation)
                    self._perform(self.lives.condemned(member, self.clock.now()))
            self._changed.set()

    async def _look_for_dying(self) -> None:
        """The pidfd fires when the kernel has taken the process apart, which may be long after."""
        poll_s = self.setup.dying_poll_s
        while poll_s > 0:
            await asyncio.sleep(poll_s)
            for life in self.lives.living():
                rank = life.member.rank
                seen = self._processes[rank].dying()
                if seen is not None:
                    log.info("rank_dying", member=str(life.member), pid=life.pid)
                    self._perform(self.lives.dying(rank, seen.exit_code))

    def _look_for_stopped(self) -> None:
        """SIGCHLD: a child has exited (the pidfds tell), was stopped, or goes on."""
        for life in self.lives.running():
            process = self._processes.get(life.member.rank)
            if process is not None and process.was_stopped():
                log.warning("rank_stopped", member=str(life.member), pid=life.pid)
                self._tasks.create_task(
                    self.obituary.report_stopped(life, agent_lease_id=self._lease_id)
                )

    async def _wait(self) -> None:
        """Until something changed or a rank is due."""
        due_at = self.lives.next_due_at()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due_at is None else due_at - self.clock.now()):
                await self._changed.wait()
        self._changed.clear()

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Bury(life=life, exit_code=exit_code):
                    self._bury(life, exit_code)
                case Spawn(rank=rank):
                    self._tasks.create_task(self._spawn(rank))
                case Terminate(life=life):
                    self._processes[life.member.rank].send_signal(signal.SIGTERM)
                case Kill(life=life):
                    log.warning("condemned_rank_killed", member=str(life.member), pid=life.pid)
                    self._processes[life.member.rank].send_signal(signal.SIGKILL)

    async def _spawn(self, rank: RankId) -> None:
        lease_id = 0
        try:
            member, lease_id = await new_life(self.store, self.keys, rank, self.setup.lease_ttl_s)
            process = self._start(member, lease_id)
        except (StoreError, OSError) as error:
            log.error("spawn_failed", rank=rank, detail=str(error))
            if lease_id:
                with contextlib.suppress(StoreUnavailable):
                    await self.store.revoke_lease(lease_id)
            self._perform(self.lives.spawn_failed(rank, self.clock.now()))
            self._changed.set()
            return
        life = Life(member=member, lease_id=lease_id, pid=process.pid)
        log.info("rank_started", member=str(member), pid=process.pid)
        self._hold(life, process)
        self._perform(self.lives.spawned(life, self.clock.now()))

    def _start(self, member: Member, lease_id: int) -> RankProcess:
        log_dir, command = self.setup.log_dir, self.setup.command
        return spawn(
            command.argv(member, lease_id),
            environment=self.setup.environment,
            pass_fds=[command.lifeline_fd, command.host_experts_fd],
            log_path=None if log_dir is None else log_dir / f"rank-{member.rank}.log",
            cpus=self.setup.cpus.get(member.rank, frozenset()),
        )

    def _hold(self, life: Life, process: RankProcess) -> None:
        rank = life.member.rank
        self._processes[rank] = process
        self._nurses[rank] = self._tasks.create_task(self._nurse(life))
        asyncio.get_running_loop().add_reader(process.fileno(), self._exited, rank)

    async def _nurse(self, life: Life) -> None:
        await nurse_lease(self.store, self.keys, life, self.setup.lease_ttl_s)
        if len(self._processes) == len(self.setup.cpus):
            self._pin(self.setup.cpus)

    def _pin(self, cpus: Mapping[RankId, frozenset[int]]) -> None:
        for rank, process in self._processes.items():
            with contextlib.suppress(FileNotFoundError):
                process.run_on(cpus[rank])

    def _unpin(self) -> None:
        """While a rank is missing its CPUs are for all: survivors have its work to do, too."""
        everything = frozenset[int]().union(*self.setup.cpus.values())
        self._pin(dict.fromkeys(self.setup.cpus, everything))

    def _exited(self, rank: RankId) -> None:
        """The pidfd fired. The revocation goes out before anything else is done."""
        process = self._processes.pop(rank)
        asyncio.get_running_loop().remove_reader(process.fileno())
        exit_code = process.exit_code()
        process.close()
        self._perform(self.lives.exited(rank, exit_code, self.clock.now()))
        log.info("rank_exited", rank=rank, pid=process.pid, detail=describe_exit(exit_code))
        if self.setup.cpus:
            self._unpin()
        self._nurses.pop(rank).cancel()
        self._changed.set()

    def _bury(self, life: Life, exit_code: int | None) -> None:
        burial = self._tasks.create_task(
            self.obituary.publish(life, exit_code, agent_lease_id=self._lease_id)
        )
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)

    def _lease_id(self) -> int:
        return self.leased.lease_id
