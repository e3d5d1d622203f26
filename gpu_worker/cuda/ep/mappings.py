"""Whose buffers are mapped into this rank's, and when a former life's is unmapped. Who takes part
is `ep_members`'.

Mooncake disconnects a rank once no kernel of this process is left, and holds Python's lock until
then; unmapping memory may wait for those of other processes on the card as well, which may be
waiting for this one. So what has to be unmapped under an adopted map stays until the pause in which
the next life is adopted (see `exchange/graph_barrier.py`), and that life is mapped there, too.
Where nothing has to be unmapped a life is mapped at once: that waits for no kernel, and shows
before a map names the life whether it can be mapped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import structlog

from gpu_worker.cuda.ep.handles import HandleStore
from gpu_worker.cuda.ep.members import EpMembers
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
    """Maps and unmaps on one thread of its own: one at a time, and what a failed attempt leaves
    behind as the last error of its thread does not reach the engine's launches."""

    def __init__(
        self,
        ep_members: EpMembers,
        lock: threading.Lock,
        buffer: MappedBuffer,
        handle_store: HandleStore,
        clock: Clock,
        init_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """`lock` guards `ep_members`. `init_thread` is called once, on that thread."""
        self._ep_members = ep_members
        self._lock = lock
        self._buffer = buffer
        self._handle_store = handle_store
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "mappings", initializer=init_thread)

    def connect(self, peer: Member, handles: ExchangeHandles) -> None:
        """Meet this life, and map it if that may be done at once. Raises ConnectionError."""
        self._thread.submit(self._connect, peer, handles).result()

    def map_members(self, expert_map: ExpertMap) -> None:
        """Nothing is in flight on any member. Who cannot be mapped, as one who has just died, is
        not met any more."""
        self._thread.submit(self._map_members, expert_map).result()

    def _connect(self, peer: Member, handles: ExchangeHandles) -> None:
        with self._lock:
            at_once = self._ep_members.may_map(peer.rank)
        self._handle_store.set_handles(peer.rank, handles)
        if at_once:
            self._unmap([peer])
            try:
                self._map(peer)
            except RuntimeError as error:  # Mooncake's only kind
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
        """The former lives of these."""
        with self._lock:
            former = self._ep_members.mapped([m.rank for m in members])
        if former:
            self._buffer.disconnect_ranks([int(rank) for rank in former])
            with self._lock:
                self._ep_members.note_unmapped(former)

    def _map(self, member: Member) -> None:
        self._buffer.connect_ranks([member.rank], activate=False)
        with self._lock:
            self._ep_members.note_mapped(member)
