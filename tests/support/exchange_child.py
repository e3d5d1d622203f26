"""A rank's exchange in a process of its own, driven over a pipe. Tests of the exchange start, kill
and stop such processes. Its "model" multiplies, so that every result can be computed by hand."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_worker.cpu.kernels import arithmetic  # noqa: F401 - says where compiled kernels lie
from gpu_worker.exchange.interface import Dispatched, Exchange
from gpu_worker.exchange.links import TransferEndpoint
from gpu_worker.exchange.message import MessageLayout
from gpu_worker.exchange.transfer import TransferExchange
from shared.clock import SystemClock
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.records import RankRecord
from shared.types import (
    Epoch,
    GivenRegion,
    Incarnation,
    Member,
    NodeId,
    RankId,
    RankState,
    Step,
    SuspicionReason,
)
from shared.wire import OpenRegion, RegionOpened

H, K, E, L = 32, 2, 8, 3
TOKENS_MAX = 16
LAYOUT = MessageLayout(hidden_size=H, top_k=K, step_tokens_max=TOKENS_MAX)


def member(rank: int, incarnation: int = 7) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def make_map(
    epoch: int, ranks: Sequence[int], num_ranks: int, *, renewed: Sequence[int] = ()
) -> ExpertMap:
    """Every expert is on two ranks, or on the only one. The ranks `renewed` are in their second
    incarnation."""
    placement = np.full((L, num_ranks, 2 * E), -1, dtype=np.int16)
    for layer in range(L):
        for expert in range(E):
            for copy in range(min(2, len(ranks))):
                rank = ranks[(expert + copy + layer) % len(ranks)]
                placement[layer, rank, int((placement[layer, rank] >= 0).sum())] = expert
    members = tuple(member(r, 8 if r in renewed else 7) for r in ranks)
    return ExpertMap(epoch=Epoch(epoch), num_experts=E, members=members, placement=placement)


def compute(expert_map: ExpertMap, layer: int, rank: int, d: Dispatched) -> NDArray[np.float32]:
    experts = expert_map.placement[layer, rank, d.slots_N]
    assert (experts >= 0).all()
    scale_NH = (1 + experts[:, None]) * np.linspace(0.1, 1.0, H)[None, :] + layer
    result: NDArray[np.float32] = d.x_MH[d.rows_N] * scale_NH.astype(np.float32)
    return result


def run_step(exchange: Exchange, expert_map: ExpertMap, rank: int, step: int) -> str:
    """A digest of all results of the exchange on this rank in one step."""
    rng = np.random.default_rng((rank, expert_map.epoch, step))
    num_tokens = int(rng.integers(0, TOKENS_MAX + 1)) if step % 5 else int(rank == 0)
    exchange.begin_step(
        expert_map.epoch, Step(step), num_tokens=num_tokens, has_work=num_tokens > 0
    )
    digest = hashlib.sha256()
    for layer in range(L):
        x_TH = rng.standard_normal((num_tokens, H), dtype=np.float32)
        order_TE = rng.random((num_tokens, E)).argsort(axis=1)
        d = exchange.dispatch(layer, x_TH, order_TE[:, :K].astype(np.int32))
        for part in (d.x_MH, d.rows_N, d.slots_N):
            digest.update(np.ascontiguousarray(part).tobytes())
        digest.update(bytes([d.any_tokens, d.any_work]))
        y_TKH = exchange.combine(layer, compute(expert_map, layer, rank, d))
        assert y_TKH.shape == (num_tokens, K, H)
        digest.update(np.ascontiguousarray(y_TKH).tobytes())
    return digest.hexdigest()


class _Monitor:
    def __init__(self, pipe: Connection, lock: threading.Lock) -> None:
        self.epoch = Epoch(1)
        self._pipe = pipe
        self._lock = lock

    def newest_epoch(self) -> Epoch:
        return self.epoch

    def beat(self, waiting_for: Sequence[RankId]) -> None:
        pass

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None:
        with self._lock:
            self._pipe.send(("suspect", (int(rank), reason)))


class _Child:
    def __init__(
        self,
        rank: int,
        num_ranks: int,
        deadline_ms: float,
        shares_memory: bool,
        pipe: Connection,
    ) -> None:
        self.own = member(rank)
        self.peers = [member(r) for r in range(num_ranks) if r != rank]
        self.pipe = pipe
        self.lock = threading.Lock()
        self.monitor = _Monitor(pipe, self.lock)
        self.control = socket.create_server(("127.0.0.1", 0))
        self.endpoint = TransferEndpoint(
            "127.0.0.1", LAYOUT, SystemClock(), shares_memory=shares_memory
        )
        self.deadline_ms = deadline_ms
        self.exchange = self.new_exchange()

    def new_exchange(self) -> TransferExchange:
        return TransferExchange(
            self.endpoint, self.own, self.monitor, SystemClock(), self.deadline_ms
        )

    def renew(self) -> None:
        """As a rank's process that was fenced."""
        self.exchange.close()
        self.own = member(self.own.rank, 8)
        self.endpoint = self.endpoint.renew()
        self.exchange = self.new_exchange()

    def on_renewed(self, peer: RankId) -> None:
        self.endpoint.forget(member(peer))
        self.peers = [each for each in self.peers if each.rank != peer] + [member(peer, 8)]

    def send(self, kind: str, value: object) -> None:
        with self.lock:
            self.pipe.send((kind, value))

    def link_requests(self) -> list[tuple[Member, OpenRegion]]:
        return [
            (
                peer,
                OpenRegion(
                    source=self.own,
                    transfer_name=self.endpoint.name,
                    generation=self.endpoint.next_generation(peer),
                ),
            )
            for peer in self.peers
            if not self.endpoint.is_open(peer)
        ]

    def accept_link(self, request: OpenRegion) -> tuple[RegionOpened, RankRecord]:
        given = self.endpoint.open_region(request.source, request.generation)
        return self.opened(request, given), self.record()

    def record(self) -> RankRecord:
        return RankRecord(
            rank=self.own.rank,
            incarnation=self.own.incarnation,
            node=NodeId("n"),
            pid=os.getpid(),
            lease_id=1,
            state=RankState.READY,
            control_host="127.0.0.1",
            control_port=self.control.getsockname()[1],
            transfer_name=self.endpoint.name,
            slots=1,
            kv_blocks=1,
            kv_block_tokens=1,
            exchange="transfer",
        )

    def opened(self, request: OpenRegion, given: GivenRegion) -> RegionOpened:
        return RegionOpened(
            target=self.own,
            source=request.source,
            generation=request.generation,
            transfer_name=self.endpoint.name,
            address=given.address,
            nbytes=given.nbytes,
            memory=given.memory,
        )

    def run_steps(self, expert_map: ExpertMap, num_steps: int) -> None:
        self.run_maps([expert_map], num_steps)

    def run_maps(self, expert_maps: Sequence[ExpertMap], num_steps: int) -> None:
        """So many steps under each, one map after the other."""
        results: list[str] = []
        try:
            for expert_map in expert_maps:
                self.exchange.adopt(expert_map)
                self.send("adopted", None)
                for step in range(num_steps):
                    results.append(run_step(self.exchange, expert_map, self.own.rank, step))
        except StepAbandoned:
            self.send("abandoned", results)
        else:
            self.send("done", results)

    def handle(self, kind: str, value: Any) -> None:
        if kind == "link_requests":
            self.send("link_requests", self.link_requests())
        elif kind == "accept_link":
            self.send("link_accepted", self.accept_link(value))
        elif kind == "connect":
            self.endpoint.connect(*value)
            self.send("connected", None)
        elif kind == "forget":
            self.endpoint.forget(member(value))
        elif kind == "renew":
            self.renew()
            self.send("renewed", None)
        elif kind == "on_renewed":
            self.on_renewed(value)
        elif kind == "memory_links":
            self.send("memory_links", self.endpoint.memory_links)
        elif kind == "half_open":
            self.send("half_open", num_half_open())
        elif kind == "epoch":
            self.monitor.epoch = value
        elif kind == "run_maps":
            threading.Thread(target=self.run_maps, args=value, daemon=True).start()
        elif kind == "run":
            threading.Thread(target=self.run_steps, args=value, daemon=True).start()


def num_half_open() -> int:
    """The number of sockets of this process whose peer has closed its end."""
    lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    waiting = {fields[9] for line in lines if (fields := line.split())[3] == "08"}
    links = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return sum(link.removeprefix("socket:[").removesuffix("]") in waiting for link in links)


def main(
    rank: int, num_ranks: int, deadline_ms: float, shares_memory: bool, pipe: Connection
) -> None:
    child = _Child(rank, num_ranks, deadline_ms, shares_memory, pipe)
    while True:
        try:
            child.handle(*pipe.recv())
        except EOFError:
            return
