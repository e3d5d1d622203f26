"""The memory that a rank gives to its peers: one region for each incarnation of a source and each
generation of its link. Regions are registered with Mooncake, never given twice, and released only
when no late write can arrive any more."""

from __future__ import annotations

import mmap
import threading

import numpy as np

from gpu_worker.exchange.message import MessageLayout, message_buffers_of
from gpu_worker.exchange.mooncake_engine import TransferEngine
from shared.types import Member

QUARANTINE_S = 180.0
"""Longer than any write that Mooncake may still have in flight: its longest stall is 61 s."""


class Region:
    """Registered anonymous memory in the layout of a region: a receive region or a send buffer."""

    def __init__(self, engine: TransferEngine, layout: MessageLayout, generation: int) -> None:
        self.generation = generation
        self.nbytes = layout.region_bytes
        # Populated now, so that no step waits for the first touch of a page.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self._memory = np.frombuffer(mmap.mmap(-1, self.nbytes, flags=flags), dtype=np.uint8)
        self.address = int(self._memory.ctypes.data)
        self.message_buffers = message_buffers_of(self._memory, layout)
        self._engine = engine
        if engine.register_memory(self.address, self.nbytes) != 0:
            raise MemoryError(f"Mooncake cannot register {self.nbytes} bytes")

    def unregister(self) -> None:
        """The memory itself is freed with the last view of it."""
        self._engine.unregister_memory(self.address)


class Regions:
    """All receive regions of a rank. Any thread may call it."""

    def __init__(self, engine: TransferEngine, layout: MessageLayout) -> None:
        self._engine = engine
        self._layout = layout
        self._lock = threading.Lock()
        self._given: dict[Member, tuple[Region, ...]] = {}
        self._retired: list[tuple[float, Region]] = []

    def give(self, source: Member, generation: int) -> Region:
        """The region of this generation: the same one on every call. Raises ValueError if a later
        generation has been given, MemoryError if Mooncake cannot register the region."""
        with self._lock:
            regions = self._given.get(source, ())
            if regions and regions[0].generation == generation:
                return regions[0]
            if regions and regions[0].generation > generation:
                raise ValueError(f"{source} asks for generation {generation} of its region again")
            region = Region(self._engine, self._layout, generation)
            self._given[source] = (region, *regions)
            return region

    def of(self, source: Member) -> tuple[Region, ...]:
        """The source's regions, newest first. A message may have arrived in an older one before the
        link was opened again."""
        return self._given.get(source, ())

    def retire(self, source: Member, now: float) -> None:
        """Quarantines the source's regions: its record is gone, so nobody reads them again."""
        with self._lock:
            self._retired += [(now, region) for region in self._given.pop(source, ())]

    def sweep(self, now: float) -> None:
        """Releases the regions whose quarantine has ended."""
        with self._lock:
            due = [region for at, region in self._retired if now - at >= QUARANTINE_S]
            self._retired = [
                (at, region) for at, region in self._retired if now - at < QUARANTINE_S
            ]
        for region in due:
            region.unregister()
