"""The memory that a rank gives to its peers: one region for each incarnation of a source and each
generation of its link. Regions are registered with Mooncake, never given twice, and released only
when no late write can arrive any more. Until then they are in quarantine."""

from __future__ import annotations

import mmap
import threading
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from gpu_worker.exchange.message import (
    BELL_OFFSET,
    MAPPED_OFFSET,
    MessageLayout,
    message_buffers_of,
)
from gpu_worker.exchange.mooncake_engine import TransferEngine
from gpu_worker.exchange.shared_memory import SharedMemory
from shared.types import Member

log = structlog.get_logger()

QUARANTINE_S = 180.0
"""Longer than any write that Mooncake may still have in flight: its longest stall is 61 s."""


REGIONS_READ_MAX = 4
"""Of one source: older ones are quarantined. A message of the present step cannot have arrived so
many generations ago."""
REGIONS_MAX = 32
"""Of one source, those in quarantine included: a link that breaks again and again waits then."""


class Region:
    """Registered memory in the layout of a region: a receive region or a send buffer."""

    def __init__(
        self,
        engine: TransferEngine,
        layout: MessageLayout,
        generation: int,
        shared: SharedMemory | None = None,
    ) -> None:
        """Takes anonymous memory if there is none that peers of the host can open. Raises
        MemoryError."""
        self.generation = generation
        self.nbytes = layout.region_bytes
        self.handle = None if shared is None else shared.handle
        self._shared = shared
        memory = _anonymous_memory(self.nbytes) if shared is None else shared.memory
        self.address = int(memory.ctypes.data)
        self.bell = self.address + BELL_OFFSET
        self.message_buffers = message_buffers_of(memory, layout)
        self._mapped = memory[MAPPED_OFFSET : MAPPED_OFFSET + 4].data.cast("i")
        self._engine = engine
        if engine.register_memory(self.address, self.nbytes) != 0:
            self._close()
            raise MemoryError(f"Mooncake cannot register {self.nbytes} bytes")

    @property
    def is_mapped(self) -> bool:
        """Whether the source has opened the memory. It rings after each message then."""
        return self._mapped[0] != 0

    def unregister(self) -> None:
        """The memory itself is freed with the last view of it."""
        self._close()
        self._engine.unregister_memory(self.address)

    def release(self, *, is_overdue: bool) -> bool:
        """Implements `RegisteredMemory`: nobody knows which writes of a peer are still pending. But
        one that has mapped the memory never writes by Mooncake, and keeps what it writes into."""
        self._close()
        if is_overdue or self.is_mapped:
            self.unregister()
            return True
        return False

    def _close(self) -> None:
        if self._shared is not None:
            self._shared.close()


def _anonymous_memory(nbytes: int) -> NDArray[np.uint8]:
    # Populated now, so that no step waits for the first touch of a page.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=np.uint8)


class RegisteredMemory(Protocol):
    """Memory that Mooncake may still read or write."""

    def release(self, *, is_overdue: bool) -> bool:
        """Unregisters the memory if no write can touch it any more; in any case if `is_overdue`.
        Whether it did."""
        ...


class Quarantine:
    """Memory that is no longer used, for as long as late writes may touch it. It outlives an
    incarnation that ends in a process that lives on. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: list[tuple[float, RegisteredMemory]] = []

    def put(self, memory: RegisteredMemory, now: float) -> None:
        with self._lock:
            if not memory.release(is_overdue=False):
                self._memory.append((now, memory))

    def sweep(self, now: float) -> None:
        """Releases what can be released, and all that has been here for QUARANTINE_S. To be called
        now and then: nothing else frees memory."""
        with self._lock:
            self._memory = [
                (at, memory)
                for at, memory in self._memory
                if not memory.release(is_overdue=now - at >= QUARANTINE_S)
            ]


class Regions:
    """All receive regions of an incarnation. Any thread may call it."""

    def __init__(
        self,
        engine: TransferEngine,
        layout: MessageLayout,
        quarantine: Quarantine,
        *,
        shares_memory: bool = False,
    ) -> None:
        """`shares_memory`: sources of the same host may open their regions."""
        self._engine = engine
        self._shares_memory = shares_memory
        self._layout = layout
        self._quarantine = quarantine
        self._lock = threading.Lock()
        self._given: dict[Member, tuple[Region, ...]] = {}
        self._replaced_at: dict[Member, tuple[float, ...]] = {}  # less than QUARANTINE_S ago

    def give(self, source: Member, generation: int, now: float) -> Region:
        """The region of this generation: the same one on every call. Raises ValueError if a later
        generation has been given, MemoryError if Mooncake cannot register the region or the source
        has had REGIONS_MAX."""
        with self._lock:
            regions = self._given.get(source, ())
            if regions and regions[0].generation == generation:
                return regions[0]
            if regions and regions[0].generation > generation:
                raise ValueError(f"{source} asks for generation {generation} of its region again")
            replaced_at = [t for t in self._replaced_at.get(source, ()) if now - t < QUARANTINE_S]
            if len(regions) + len(replaced_at) >= REGIONS_MAX:
                raise MemoryError(f"{source} has had {REGIONS_MAX} regions; wait for some to end")
            shared = self._make_shared_memory() if self._shares_memory else None
            region = Region(self._engine, self._layout, generation, shared)
            for replaced in regions[REGIONS_READ_MAX - 1 :]:
                self._quarantine.put(replaced, now)
                replaced_at.append(now)
            self._given[source] = (region, *regions[: REGIONS_READ_MAX - 1])
            self._replaced_at[source] = tuple(replaced_at)
            return region

    def of(self, source: Member) -> tuple[Region, ...]:
        """The source's regions, newest first. A message may have arrived in an older one before the
        link was opened again."""
        return self._given.get(source, ())

    def retire(self, source: Member, now: float) -> None:
        """Quarantines the source's regions: its record is gone, so nobody reads them again."""
        with self._lock:
            retired = self._given.pop(source, ())
            self._replaced_at.pop(source, None)
        for region in retired:
            self._quarantine.put(region, now)

    def retire_all(self, now: float) -> None:
        """Quarantines all regions: the incarnation has ended."""
        for source in list(self._given):
            self.retire(source, now)

    def _make_shared_memory(self) -> SharedMemory | None:
        try:
            return SharedMemory(self._layout.region_bytes)
        except OSError as error:
            log.warning("no_shared_memory", detail=str(error), instead="Mooncake")
            return None
