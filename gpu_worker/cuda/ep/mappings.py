"""Which peers' buffers are mapped into this process, and when that of a former incarnation is
unmapped. Who takes part is `members`' to decide.

Mooncake disconnects a rank only when no kernel of this process runs, and holds Python's lock until
then. Unmapping memory may also wait for kernels of other processes on the card, and those may wait
for this process. So a buffer that must be unmapped under an adopted map stays mapped until the
pause in which the next incarnation is adopted (see `exchange/graph_barrier.py`); the next
incarnation is mapped in that pause too. If nothing has to be unmapped, an incarnation is mapped at
once: that waits for no kernel, and it shows before a map names the incarnation whether it can be
mapped. An incarnation that came back in its process has the buffer of the one before it, which is
mapped already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

import structlog

from gpu_worker.cuda.ep.handles import HandleStore
from gpu_worker.cuda.ep.members import EpMembers
from gpu_worker.exchange.worker_thread import Worker
from shared.clock import Clock
from shared.expert_map import ExpertMap
from shared.records import ExchangeHandles
from shared.types import Member

log = structlog.get_logger()


class MappedBuffer(Protocol):
    """What is asked of Mooncake's Buffer. `connect_ranks` raises RuntimeError."""

    def connect_ranks(self, remote_ranks: list[int], activate: bool = True) -> None: ...

    def disconnect_ranks(self, remote_ranks: list[int]) -> None: ...


class EpMappings:
    """Maps and unmaps on a thread of its own, one peer at a time. CUDA keeps the last error per
    thread, so the error of a failed attempt does not reach the engine's launches."""

    def __init__(
        self,
        ep_members: EpMembers,
        lock: threading.Lock,
        buffer: MappedBuffer,
        handle_store: HandleStore,
        clock: Clock,
        worker: Worker,
        check_device: Callable[[], None],
    ) -> None:
        """`lock` guards `ep_members`. `worker` maps and unmaps. `check_device` raises DeviceLost if
        this process can use its own card no more."""
        self._ep_members = ep_members
        self._lock = lock
        self._buffer = buffer
        self._handle_store = handle_store
        self._clock = clock
        self._worker = worker
        self._check_device = check_device

    def connect(self, peer: Member, handles: ExchangeHandles) -> None:
        """Meets this incarnation, and maps it if that may be done at once. Raises ConnectionError
        if the peer cannot be mapped, DeviceLost if nobody can."""
        self._worker.call(lambda: self._connect(peer, handles))

    def map_members(self, expert_map: ExpertMap) -> Future[None]:
        """Nothing is in flight on any member until the future has ended. A member that cannot be
        mapped, such as one that has just died, is not met any more. The future may raise
        DeviceLost."""
        return self._worker.submit(lambda: self._map_members(expert_map))

    def call(self, work: Callable[[], None]) -> None:
        """After all mapping that was asked for before. Returns when it has ended, and raises what
        it raised."""
        self._worker.call(work)

    def _connect(self, peer: Member, handles: ExchangeHandles) -> None:
        with self._lock:
            at_once = self._ep_members.may_map(peer.rank)
            is_mapped = self._handle_store.is_mapped(peer.rank, handles)
            if is_mapped:
                self._ep_members.note_mapped(peer)
        self._handle_store.set_handles(peer.rank, handles)
        if at_once and not is_mapped:
            self._unmap([peer])
            try:
                self._map(peer)
            except RuntimeError as error:  # Mooncake's only kind, whoever is to blame
                self._check_device()
                raise ConnectionError(f"rank {peer}: {error}") from error
        with self._lock:
            self._ep_members.mark_connected(peer)

    def _map_members(self, expert_map: ExpertMap) -> None:
        with self._lock:
            members = self._ep_members.members_to_map(expert_map)
        if not members:
            return
        began = self._clock.now()
        self._unmap(members)
        unmapped = self._clock.now()
        for member in members:
            try:
                self._map(member)
            except RuntimeError as error:
                self._check_device()
                log.warning("peer_not_mapped", peer=str(member), detail=str(error))
                with self._lock:
                    self._ep_members.mark_unmappable(member)
        log.info(
            "peers_mapped",
            epoch=expert_map.epoch,
            ranks=[m.rank for m in members],
            unmapping_ms=round((unmapped - began) * 1e3, 2),
            mapping_ms=round((self._clock.now() - unmapped) * 1e3, 2),
        )

    def _unmap(self, members: Sequence[Member]) -> None:
        """The former incarnations of these."""
        with self._lock:
            former = self._ep_members.mapped([m.rank for m in members])
        if former:
            self._buffer.disconnect_ranks([int(rank) for rank in former])
            with self._lock:
                self._ep_members.note_unmapped(former)
            for rank in former:
                self._handle_store.note_unmapped(rank)

    def _map(self, member: Member) -> None:
        self._buffer.connect_ranks([member.rank], activate=False)
        self._handle_store.note_mapped(member.rank)
        with self._lock:
            self._ep_members.note_mapped(member)
