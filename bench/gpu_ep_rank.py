"""A rank of the GPU experiment: a process of its own with one end of the exchange, its experts, a
step loop, and a watch on etcd that ends waits and brings maps. Run by `bench.gpu_ep_control`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu_ep_log import StepLog
from bench.gpu_ep_model import HostWeights, Step, StepShape, seeded_expert
from gpu_worker.exchange.replica_choice import ReplicaPolicy, choose_replicas
from shared.errors import StepAbandoned
from shared.etcd_store import EtcdStore, connect_store
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import SlotContents, Verdict, unpack_map, unpack_record
from shared.store import Snapshot
from shared.types import Epoch, Incarnation, Member, RankId
from shared.types import Step as StepIndex

if TYPE_CHECKING:
    from gpu_worker.cuda.ep_exchange import EpExchange

_LEASE_TTL_S = 10.0
_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankArguments:
    rank: int
    incarnation: int
    num_ranks: int
    slots: int
    gpus: int
    shape: StepShape
    endpoint: str
    instance: str
    folder: str
    step_timeout_ms: int
    host_copy: bool
    blocking_sync: bool


def main(arguments: RankArguments, pipe: Connection) -> None:
    run_rank(Rank(arguments, pipe))


def run_rank(rank: Rank) -> None:
    """To its end; what fails is told to the control process, which ends the run."""
    try:
        asyncio.run(rank.run())
    except BaseException as error:  # noqa: BLE001
        with contextlib.suppress(OSError):
            rank.tell("failed", f"{error!r}\n{traceback.format_exc()[-2500:]}")
        os._exit(1)


class Rank:
    def __init__(self, arguments: RankArguments, pipe: Connection) -> None:
        self.arguments, self.pipe = arguments, pipe
        self.own = Member(
            rank=RankId(arguments.rank), incarnation=Incarnation(arguments.incarnation)
        )
        self.keys = Keys(arguments.instance)
        self.maps: queue.Queue[ExpertMap] = queue.Queue()
        self.first_contents: queue.Queue[SlotContents] = queue.Queue()
        self.join_ticks: dict[int, int] = {}
        self.go: queue.Queue[list[tuple[str, int]]] = queue.Queue()
        self.stop_at = 1 << 60
        self.newest_epoch = 0
        self.residents: NDArray[np.int16] | None = None
        self.send_lock = threading.Lock()

    def tell(self, *message: object) -> None:
        with self.send_lock:
            self.pipe.send(message)

    async def run(self) -> None:
        a = self.arguments
        import torch

        torch.cuda.set_device(a.rank % a.gpus)
        self.device = torch.device("cuda", a.rank % a.gpus)
        store = await connect_store([a.endpoint], timeout_s=20.0)
        lease_id = await store.grant_lease(_LEASE_TTL_S)
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._open, store, loop, lease_id)
        commands: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        threading.Thread(target=self._read_pipe, args=(loop, commands), daemon=True).start()
        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(self._keep_alive(store, lease_id))
            watcher = tasks.create_task(self._watch(store))
            engine = tasks.create_task(asyncio.to_thread(self._engine))
            obeyer = tasks.create_task(self._obey(commands))
            await engine
            for task in (keeper, watcher, obeyer):
                task.cancel()
        os._exit(0)

    def _open(self, store: EtcdStore, loop: asyncio.AbstractEventLoop, lease_id: int) -> None:
        import torch

        from gpu_worker.cuda.ep_rendezvous import EpRendezvous

        a = self.arguments
        torch.cuda.set_device(self.device)
        self.rendezvous = EpRendezvous(store, loop, self.keys, self.own, lease_id=lease_id)
        self.exchange = self.open_exchange()
        self.step = Step(a.shape, a.num_ranks, a.slots, a.rank, self.exchange)
        self.log = StepLog(Path(a.folder), a.rank, a.incarnation, a.shape.tokens, "r+")
        self.host = HostWeights(Path(a.folder) / "experts", a.shape) if a.host_copy else None

    def open_exchange(self, *, fp8: bool = False) -> EpExchange:
        from gpu_worker.cuda.ep_exchange import EpExchange, EpShape, EpTimeouts

        a = self.arguments
        shape = EpShape(
            num_ranks=a.num_ranks,
            slots_per_rank=a.slots,
            hidden_size=a.shape.hidden,
            step_tokens_max=a.shape.tokens,
            fp8=fp8,
        )
        timeouts = EpTimeouts(step_ms=a.step_timeout_ms)
        return EpExchange(self.own, shape, self.rendezvous, timeouts, device=self.device)

    # What arrives --------------------------------------------------------------------------------

    def _read_pipe(self, loop: asyncio.AbstractEventLoop, commands: asyncio.Queue[Any]) -> None:
        while True:
            try:
                message = self.pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            if message[0] == "stop_at":
                self.stop_at = message[1]
            elif message[0] == "join_tick":
                self.join_ticks[message[1]] = message[2]
            elif message[0] == "go":
                self.go.put(message[1])
            else:
                loop.call_soon_threadsafe(commands.put_nowait, message)

    async def _obey(self, commands: asyncio.Queue[tuple[Any, ...]]) -> None:
        while True:
            name, argument = await commands.get()
            began = time.monotonic()
            if name == "connect":
                await asyncio.to_thread(self._connect, argument)
            elif name == "disconnect":
                await asyncio.to_thread(self.exchange.disconnect, argument)
            self.tell(name + "ed", time.monotonic() - began)

    def _connect(self, peers: Mapping[int, tuple[int, int]]) -> None:
        from gpu_worker.cuda.ep_rendezvous import Peer

        lives = {RankId(rank): Incarnation(life) for rank, (life, _) in peers.items()}
        self.rendezvous.expect(
            {
                rank: Peer(Member(rank=rank, incarnation=life), peers[rank][1])
                for rank, life in lives.items()
            }
        )
        self.exchange.connect(lives)

    async def _watch(self, store: EtcdStore) -> None:
        mine = self.keys.assignment(self.own.rank, self.own.incarnation)
        loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        async for event in store.watch(self.keys.serving):
            for entry in event.values if isinstance(event, Snapshot) else (event,):
                if entry.value is None:
                    continue
                if entry.key == self.keys.map:
                    self._see_map(unpack_map(entry.value))
                elif entry.key.startswith(self.keys.verdicts):
                    verdict = unpack_record(entry.value, Verdict)
                    dead = Member(rank=verdict.rank, incarnation=verdict.incarnation)
                    self.exchange.release([dead], verdict.epoch)
                    self.tell("released", dead)
                elif entry.key == mine:
                    contents = unpack_record(entry.value, SlotContents)
                    if self.residents is None:
                        self.first_contents.put(contents)
                    else:
                        loader.submit(self._load_beside, contents)

    def _see_map(self, expert_map: ExpertMap) -> None:
        """On the event loop, not on the engine thread, which may be stuck behind a dead rank."""
        if expert_map.epoch <= self.newest_epoch:
            return
        self.newest_epoch = expert_map.epoch
        if not expert_map.has(self.own):
            return
        gone = self.exchange.members - frozenset(expert_map.members)
        self.exchange.release(gone, expert_map.epoch)
        self.maps.put(expert_map)

    async def _keep_alive(self, store: EtcdStore, lease_id: int) -> None:
        while True:
            await store.keep_alive(lease_id)
            await asyncio.sleep(_LEASE_TTL_S / 3)

    # The engine thread ---------------------------------------------------------------------------

    def _engine(self) -> None:
        import torch

        torch.cuda.set_device(self.device)
        a = self.arguments
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.done = torch.cuda.Event(blocking=a.blocking_sync)  # type: ignore[no-untyped-call]
        self.load_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.tick = 0
        with torch.cuda.stream(self.stream):
            if self.host is not None and a.incarnation == 1:
                self._fill_host_copy()
            self.tell("made", None)
            first = self.first_contents.get(timeout=_TIMEOUT_S)
            if self.host is not None:
                self.host.open_stages()
            began = time.monotonic()
            self._load(first)
            loaded = time.monotonic()
            with self.exchange.warm_up():
                for _ in range(2):
                    self.step.run(elastic=True)
                    self.step.run(elastic=False)
                torch.cuda.synchronize()
            warm = time.monotonic()
            self.step.capture()
            self.tell(
                "ready",
                {
                    "load_s": loaded - began,
                    "warm_s": warm - loaded,
                    "capture_s": time.monotonic() - warm,
                    "memory_gb": torch.cuda.memory_allocated() / 1e9,
                },
            )
            self._join_first_map()
            for kind, steps in self.go.get(timeout=_TIMEOUT_S):
                self._segment(kind, steps)
            self._serve()
            torch.cuda.synchronize()
        self.tell("stopped", self.log.committed)

    def _fill_host_copy(self) -> None:
        import torch

        assert self.host is not None
        for layer in range(self.arguments.shape.layers):
            for expert in range(
                self.arguments.rank, self.arguments.shape.experts, self.arguments.num_ranks
            ):
                values = seeded_expert(self.arguments.shape, layer, expert, self.device)
                self.host.view(layer, expert).copy_(values)
        torch.cuda.synchronize()

    def _load_beside(self, wanted: SlotContents) -> None:
        """While the engine may be stuck behind a peer that waits for the next map."""
        try:
            self._load(wanted)
            self.tell("loaded", wanted.slots)
        except RuntimeError as error:
            self.tell("failed", repr(error))

    def _load(self, wanted: SlotContents) -> None:
        """What differs from what the slots hold. On a stream of its own: it must not wait for a
        step."""
        import torch

        slots_LS = wanted.array()
        if self.residents is None:
            self.residents = np.full_like(slots_LS, -1)
        with torch.cuda.stream(self.load_stream):
            for layer, slot in np.argwhere((slots_LS != self.residents) & (slots_LS >= 0)):
                expert = int(slots_LS[layer, slot])
                if self.host is not None:
                    values = self.host.staged(int(layer), expert)
                else:
                    values = seeded_expert(self.arguments.shape, int(layer), expert, self.device)
                self.step.load(int(layer), int(slot), values)
                self.residents[layer, slot] = expert
        self.load_stream.synchronize()

    def _join_first_map(self) -> None:
        wanted = self.maps.get(timeout=_TIMEOUT_S)
        while wanted.epoch not in self.join_ticks:
            time.sleep(0.001)
        self._adopt(wanted)
        self.tick = self.join_ticks[wanted.epoch]
        self.tell("entered", wanted.epoch)

    def _adopt(self, expert_map: ExpertMap) -> None:
        choice = choose_replicas(expert_map, self.own.rank, ReplicaPolicy.SPREAD)
        slot_of = choice.rank_LE.astype(np.int64) * self.arguments.slots + choice.slot_LE
        self.step.set_table(slot_of)
        self.exchange.adopt(expert_map)
        self.epoch = Epoch(expert_map.epoch)
        self.log.note_epoch(expert_map.epoch)

    def _take_map(self) -> bool:
        """The newest map at hand. One with joiners waits for its tick."""
        while True:
            try:
                wanted = self.maps.queue[0]
            except IndexError:
                return False
            joins = frozenset(wanted.members) - self.exchange.members
            if joins and self.tick < self.join_ticks.get(wanted.epoch, 1 << 60):
                return False
            assert not joins or self.tick == self.join_ticks[wanted.epoch], "told too late"
            self.maps.get()
            if not joins and self.maps.queue:
                continue  # overtaken
            self._adopt(wanted)
            if joins:
                self.tell("entered", wanted.epoch)
            return True

    def _segment(self, kind: str, steps: int) -> None:
        """A stretch of steps that all ranks run alike, timed."""
        graph = self.step.graphs[kind]
        step = self.step
        tokens: NDArray[Any] = step.first_tokens()
        began = time.perf_counter()
        for index in range(steps):
            self._set_input(tokens, index % self.arguments.shape.period)
            graph.replay()
            self.done.record(self.stream)
            self.done.synchronize()
            if kind == "elastic":
                self._take_map()
                self.exchange.begin_step(self.epoch, StepIndex(index))
                tokens = self.exchange.tokens_after_step(len(tokens))
            else:
                tokens = step.static_tokens()
            self.tick += 1
        self.tell("segment", (kind, steps, time.perf_counter() - began))

    def _set_input(self, tokens: NDArray[Any], position: int) -> None:
        view = self.step.input_host.numpy()
        view[:-1] = tokens
        view[-1] = position

    def _serve(self) -> None:
        first = self.step.first_tokens().astype(np.int32)
        tokens, period = first, self.arguments.shape.period
        graph, log = self.step.graphs["elastic"], self.log
        while self.tick < self.stop_at:
            self._take_map()
            position = log.committed % period
            if position == 0:
                tokens = first
            self._set_input(tokens, position)
            self.exchange.begin_step(self.epoch, StepIndex(self.tick))
            graph.replay()
            self.done.record(self.stream)
            self.done.synchronize()
            self.tick += 1
            log.note_tick(self.tick)
            try:
                tokens = self.exchange.tokens_after_step(len(first)).copy()
            except StepAbandoned:
                log.note_abandoned()
                self._await_map()
            else:
                log.commit(time.monotonic_ns(), self.epoch, tokens)

    def _await_map(self) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._take_map():
            if time.monotonic() > deadline:
                raise TimeoutError("no map after an abandoned step")
            with self.maps.not_empty:
                if not self.maps.queue:
                    self.maps.not_empty.wait(0.01)
