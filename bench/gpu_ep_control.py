"""The control side of the GPU experiment: spawns ranks, hears of deaths and stops as a node agent
does, plans with the control plane's planner, and publishes verdicts, assignments and maps through
etcd."""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Coroutine, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu_ep_log import Disturbance, StepLog, disturbance
from bench.gpu_ep_rank import RankArguments, main
from control_plane.placement import grow, place, shrink
from gpu_worker.agent.dying import is_dying
from shared.etcd_store import EtcdStore
from shared.expert_map import ExpertMap, Placement
from shared.keys import Keys
from shared.records import SlotContents, Verdict, pack_map, pack_record
from shared.store import Put
from shared.types import Epoch, Incarnation, Member, NodeId, RankId, SuspicionReason

_TIMEOUT_S = 240.0
_GRACE_S = 0.05  # a stopped process may come back: the agent waits as long for a sign of life
_POLL_S = 0.003
_COALESCE_S = 0.003  # exits that follow each other so closely are planned for together


class Control:
    """All ranks of one instance, by number; a rank has one life at a time."""

    def __init__(
        self, store: EtcdStore, base: RankArguments, target: Any = main, *, early: bool = True
    ) -> None:
        self.store, self.base, self.target, self.early = store, base, target, early
        self.keys = Keys(base.instance)
        self.nodes = {RankId(r): NodeId("host") for r in range(base.num_ranks)}
        self.slots = {RankId(r): base.slots for r in range(base.num_ranks)}
        self.incarnations = dict.fromkeys(range(base.num_ranks), 0)
        self.processes: dict[int, Any] = {}
        self.pipes: dict[int, Connection] = {}
        self.inbox: dict[int, asyncio.Queue[tuple[Any, ...]]] = {}
        self.logs: dict[tuple[int, int], StepLog] = {}
        self.map: ExpertMap | None = None
        self.heard_of: set[Member] = set()
        self.released: dict[Member, set[Member]] = {}  # by whom, whom
        self.exits: asyncio.Queue[tuple[int, SuspicionReason]] = asyncio.Queue()
        self.events: list[tuple[str, float]] = []

    # Processes -----------------------------------------------------------------------------------

    def spawn(self, ranks: Iterable[int]) -> None:
        loop, context = asyncio.get_running_loop(), mp.get_context("spawn")
        for rank in ranks:
            self.incarnations[rank] += 1
            incarnation = self.incarnations[rank]
            arguments = RankArguments(
                **{name: getattr(self.base, name) for name in RankArguments.__slots__}
                | {"rank": rank, "incarnation": incarnation}
            )
            log = StepLog(Path(self.base.folder), rank, incarnation, self.base.shape.tokens, "w+")
            self.logs[rank, incarnation] = log
            ours, theirs = context.Pipe()
            process = context.Process(target=self.target, args=(arguments, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes[rank], self.pipes[rank] = process, ours
            self.inbox[rank] = asyncio.Queue()
            loop.add_reader(ours.fileno(), self._read, rank, ours)
            assert process.pid is not None
            pidfd = os.pidfd_open(process.pid)
            loop.add_reader(pidfd, self._exited, rank, pidfd)

    def _read(self, rank: int, pipe: Connection) -> None:
        try:
            self.inbox[rank].put_nowait(pipe.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(pipe.fileno())
            pipe.close()
            self.note(f"{rank}: connection closed")
            self.inbox[rank].put_nowait(("closed", rank))

    def _exited(self, rank: int, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        self.note(f"{rank}: gone")
        self._hear_of(rank, SuspicionReason.EXIT)

    def _hear_of(self, rank: int, cause: SuspicionReason) -> None:
        """Once per life."""
        if self.life(rank) not in self.heard_of:
            self.heard_of.add(self.life(rank))
            self.exits.put_nowait((rank, cause))

    def watch_stops(self) -> None:
        def on_child() -> None:
            for rank, process in self.processes.items():
                with contextlib.suppress(ChildProcessError):
                    if os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG) is not None:
                        self._hear_of(rank, SuspicionReason.STOPPED)

        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, on_child)

    async def watch_dying(self) -> None:
        """A process that has begun to die is gone for us, long before its pidfd says so."""
        told: set[int] = set()
        while True:
            for process in self.processes.values():
                pid = process.pid
                if pid not in told and is_dying(pid):
                    told.add(pid)
                    rank = next(r for r, p in self.processes.items() if p is process)
                    self.note(f"{rank}: dying")
                    if self.early:
                        self._hear_of(rank, SuspicionReason.EXIT)
            await asyncio.sleep(_POLL_S)

    def tell(self, ranks: Iterable[int], *message: object) -> None:
        for rank in ranks:
            self.pipes[rank].send(message)

    async def hear(
        self, ranks: Sequence[int], name: str, timeout_s: float = _TIMEOUT_S
    ) -> list[Any]:
        """One message of this name from each; others before it are dropped."""
        answers = []
        async with asyncio.timeout(timeout_s):
            for rank in ranks:
                while True:
                    message = await self.inbox[rank].get()
                    if message[0] in ("failed", "closed"):
                        raise RuntimeError(f"rank {rank}: {message[1]}")
                    if message[0] == name:
                        answers.append(message[1])
                        break
        return answers

    def life(self, rank: int) -> Member:
        return Member(rank=RankId(rank), incarnation=Incarnation(self.incarnations[rank]))

    def members(self) -> list[int]:
        assert self.map is not None
        return sorted(int(m.rank) for m in self.map.members)

    def log_of(self, rank: int) -> StepLog:
        return self.logs[rank, self.incarnations[rank]]

    def tick(self) -> int:
        return max(self.log_of(rank).tick for rank in self.members())

    # Maps ----------------------------------------------------------------------------------------

    async def assign(self, placement: Placement, ranks: Iterable[int], epoch: int) -> None:
        for rank in ranks:
            own = self.life(rank)
            contents = SlotContents.of(own, placement[:, rank], epoch=epoch)
            await self.store.put(
                self.keys.assignment(own.rank, own.incarnation), pack_record(contents)
            )

    def next_map(self, placement: Placement, ranks: Iterable[int], cause: str) -> ExpertMap:
        epoch = self.map.epoch + 1 if self.map else 1
        return ExpertMap(
            epoch=Epoch(epoch),
            num_experts=self.base.shape.experts,
            members=tuple(self.life(rank) for rank in sorted(ranks)),
            placement=placement,
            cause=cause,
            published_at=time.monotonic(),
        )

    async def publish(self, expert_map: ExpertMap, *others: Put) -> None:
        assert not expert_map.uncovered()
        await self.store.txn([], [*others, Put(key=self.keys.map, value=pack_map(expert_map))])
        self.map = expert_map

    async def form(self, schedule: list[tuple[str, int]]) -> list[Any]:
        """All ranks, from nothing to serving; `schedule` is run first. Returns what they say of
        being ready."""
        ranks = list(range(self.base.num_ranks))
        shape = self.base.shape
        plan = place(
            np.ones((shape.layers, shape.experts)),
            [RankId(r) for r in ranks],
            self.nodes,
            self.slots,
            redundant=shape.redundant,
        )
        self.spawn(ranks)
        await self.hear(ranks, "made")
        await self.assign(plan.placement, ranks, 0)
        ready = await self.hear(ranks, "ready")
        await self.meet(ranks, ranks)
        expert_map = self.next_map(plan.placement, ranks, "first")
        self.tell(ranks, "join_tick", expert_map.epoch, 0)
        await self.publish(expert_map)
        await self.hear(ranks, "entered")
        self.tell(ranks, "go", schedule)
        return ready

    async def until_committed(self, steps: int) -> None:
        """By every member."""
        async with asyncio.timeout(_TIMEOUT_S):
            while min(self.log_of(rank).committed for rank in self.members()) < steps:
                self._raise_failures()
                await asyncio.sleep(0.05)

    def _raise_failures(self) -> None:
        for rank in self.members():
            if not self.inbox[rank].empty():
                message = self.inbox[rank].get_nowait()
                if message[0] == "failed":
                    raise RuntimeError(f"rank {rank}: {message[1]}")
                self.inbox[rank].put_nowait(message)

    async def meet(self, ranks: Sequence[int], joiners: Sequence[int]) -> list[float]:
        """Every joiner and everybody else."""
        for rank in ranks:
            peers = [r for r in ranks if r != rank] if rank in joiners else list(joiners)
            wanted = {p: (self.incarnations[p], 0) for p in peers}
            self.tell([rank], "connect", wanted)
        return await self.hear(ranks, "connected")

    # Faults --------------------------------------------------------------------------------------

    async def bury(self, expected: int) -> None:
        """Judges whoever is heard of until `expected` ranks are. Who dies while weights are being
        loaded for a first plan is in the next one, made anew from the standing map."""
        dead: set[int] = set()
        touched: set[int] = set()
        published = True
        while len(dead) < expected or not published:
            rank, cause = await self.exits.get()
            await asyncio.sleep(_GRACE_S if cause is SuspicionReason.STOPPED else _COALESCE_S)
            news = {rank} | {self.exits.get_nowait()[0] for _ in range(self.exits.qsize())}
            news &= set(self.members()) - (set() if published else dead)
            if news or not published:
                self.note(f"{len(news)} heard of")
                dead |= news
                published = await self.judge(dead & set(self.members()), cause, touched)

    async def judge(self, dead: set[int], cause: SuspicionReason, touched: set[int]) -> bool:
        """Whether the map without them stands. `touched`: ranks that earlier plans had load."""
        assert self.map is not None
        result = shrink(self.map, [RankId(r) for r in dead])
        assert not result.uncoverable, f"{len(result.uncoverable)} experts find no slot"
        alive = [r for r in self.members() if r not in dead]
        verdicts = [self._verdict(rank, cause, Epoch(self.map.epoch + 1)) for rank in dead]
        self.note(f"planned, {len(result.refills)} refills")
        touched |= {int(refill.rank) for refill in result.refills}
        touched &= set(alive)
        if touched:
            # No slot may change its expert while somebody can still commit a step of the old map: a
            # dead rank's kernels outlive it for a while, and may complete a step.
            await self.store.txn([], verdicts)
            lives = {self.life(rank) for rank in dead}
            if not await self._unless_news(self._all_released(alive, lives)):
                return False
            self.note("released")
            await self.assign(result.refilled, touched, self.map.epoch)
            if not await self._unless_news(self._all_loaded(result.refilled, sorted(touched))):
                return False
            self.note("loaded")
            touched.clear()
            verdicts = []
        await self.publish(self.next_map(result.refilled, alive, "shrink"), *verdicts)
        self.note("published")
        return True

    async def _all_released(self, ranks: list[int], dead: set[Member]) -> None:
        for rank in ranks:
            while not dead <= self.released.setdefault(self.life(rank), set()):
                self.released[self.life(rank)].add((await self.hear([rank], "released"))[0])

    async def _all_loaded(self, placement: Placement, ranks: list[int]) -> None:
        for rank in ranks:
            wanted = SlotContents.of(self.life(rank), placement[:, rank]).slots
            while (await self.hear([rank], "loaded"))[0] != wanted:
                pass

    async def _unless_news(self, work: Coroutine[Any, Any, None]) -> bool:
        """False as soon as somebody else is heard of."""
        task = asyncio.ensure_future(work)
        news = asyncio.ensure_future(self.exits.get())
        done, pending = await asyncio.wait((task, news), return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()
        if news in done:
            self.exits.put_nowait(news.result())
            return task in done and task.exception() is None
        task.result()
        return True

    def _verdict(self, rank: int, cause: SuspicionReason, epoch: Epoch) -> Put:
        own, now = self.life(rank), time.monotonic()
        verdict = Verdict(
            rank=own.rank,
            incarnation=own.incarnation,
            cause=cause,
            signals=(),
            epoch=epoch,
            first_signal_at=now,
            decided_at=now,
        )
        return Put(key=self.keys.verdict(own.rank, own.incarnation), value=pack_record(verdict))

    def note(self, what: str) -> None:
        self.events.append((what, time.monotonic()))

    async def strike(self, victims: Sequence[int], sig: int, settle_s: float) -> dict[str, Any]:
        """Signals all victims at once; what the others lived through."""
        before = [self.log_of(rank) for rank in self.members()]
        survivors = [self.log_of(rank) for rank in self.members() if rank not in victims]
        abandoned = [log.abandoned for log in survivors]
        self.events = []
        at_ns = time.monotonic_ns()
        for rank in victims:
            os.kill(self.processes[rank].pid, sig)
        async with asyncio.timeout(60):
            await self.bury(len(victims))
        if sig == signal.SIGSTOP:
            for rank in victims:
                self.processes[rank].kill()  # fenced: its node agent would
        await asyncio.sleep(settle_s)
        seen = disturbance(before, survivors, at_ns, time.monotonic_ns(), self.base.shape.tokens)
        if seen.tokens_per_s_after == 0:
            states = [(log.rank, log.epoch, log.tick, log.abandoned) for log in survivors]
            raise RuntimeError(f"no step since the fault: {self.events}, {states}")
        return self._told(seen, at_ns) | {
            "victims": len(victims),
            "abandoned_steps_max": max(
                log.abandoned - then for log, then in zip(survivors, abandoned, strict=True)
            ),
        }

    async def rejoin(self, ranks: Sequence[int], settle_s: float) -> dict[str, Any]:
        """New lives of dead ranks, into the running group."""
        assert self.map is not None
        for rank in ranks:  # exits of fenced lives are no news any more
            self.processes[rank].join(30)
        grown = grow(
            self.map,
            [RankId(r) for r in ranks],
            self.nodes,
            self.slots,
            redundant=self.base.shape.redundant,
        )
        began = time.monotonic()
        members = self.members()
        self.spawn(ranks)
        await self.assign(grown.placement, ranks, self.map.epoch)
        await self.hear(ranks, "ready", 60)
        ready_s = time.monotonic() - began
        survivors = [self.log_of(rank) for rank in members]
        at_ns = time.monotonic_ns()
        self.events = []
        met = await self.meet(members + list(ranks), ranks)
        self.note("connected")
        expert_map = self.next_map(grown.placement, members + list(ranks), "grow")
        first = self.tick()
        await asyncio.sleep(0.2)
        a_second = (self.tick() - first) / 0.2
        at_tick = self.tick() + max(3, math.ceil(a_second * 0.1))
        self.tell(members + list(ranks), "join_tick", expert_map.epoch, at_tick)
        await self.publish(expert_map)
        await self.hear(members + list(ranks), "entered")
        self.note("entered")
        self.tell(ranks, "go", [])
        await asyncio.sleep(settle_s)
        everybody = [self.log_of(rank) for rank in self.members()]
        seen = disturbance(survivors, survivors, at_ns, time.monotonic_ns(), self.base.shape.tokens)
        rate = disturbance(survivors, everybody, at_ns, time.monotonic_ns(), self.base.shape.tokens)
        return self._told(seen, at_ns) | {
            "joined": len(ranks),
            "ready_s": ready_s,
            "connect_ms_max": max(met) * 1e3,
            "tokens_per_s_after": rate.tokens_per_s_after,
        }

    def _told(self, seen: Disturbance, at_ns: int) -> dict[str, Any]:
        told = {name: getattr(seen, name) for name in Disturbance.__slots__}
        told["events_ms"] = [(what, round((at - at_ns / 1e9) * 1e3, 1)) for what, at in self.events]
        for sign in ("dying", "connection closed", "gone"):
            at = [ms for what, ms in told["events_ms"] if what.endswith(f": {sign}")]
            told[f"{sign} ms, first and last"] = (min(at), max(at)) if at else None
        told["events_ms"] = [event for event in told["events_ms"] if ": " not in event[0]]
        return told

    # The end -------------------------------------------------------------------------------------

    def wrong_steps(self) -> tuple[int, int]:
        """Committed steps, and those whose tokens differ from the rank's first undisturbed
        sequence."""
        steps = wrong = 0
        for (rank, _), log in self.logs.items():
            reference = self.logs[rank, 1].first_ids(self.base.shape.period)
            steps += log.committed
            wrong += log.wrong_steps(reference)
        return steps, wrong

    async def stop(self) -> None:
        at_tick = self.tick() + 200
        self.tell(self.members(), "stop_at", at_tick)
        await self.hear(self.members(), "stopped", 60)

    def kill_all(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join(20)
