"""The memory that a rank gives to its peers: one region per life of a source and generation of its
link, registered with Mooncake, never given twice, released only when no late write can come."""

from __future__ import annotations

import mmap
import threading
from typing import Protocol

import numpy as np

from gpu_worker.exchange.message import MessageLayout, message_buffers_of
from shared.types import Member

QUARANTINE_S = 180.0
"""Longer than any write that Mooncake still has in flight: its longest stall is 61 s."""


class Registry(Protocol):
    """Mooncake's memory registration: 0 is success."""

    def register_memory(self, buffer_addr: int, capacity: int) -> int: ...

    def unregister_memory(self, buffer_addr: int, /) -> int: ...


class Region:
    """Registered anonymous memory in a region's layout; a receive region or a send buffer."""

    def __init__(self, registry: Registry, layout: MessageLayout, generation: int) -> None:
        self.generation = generation
        self.nbytes = layout.region_bytes
        # Populated: no step shall wait for the first touch of a page.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self._memory = np.frombuffer(mmap.mmap(-1, self.nbytes, flags=flags), dtype=np.uint8)
        self.address = int(self._memory.ctypes.data)
        self.message_buffers = message_buffers_of(self._memory, layout)
        self._registry = registry
        if registry.register_memory(self.address, self.nbytes) != 0:
            raise MemoryError(f"Mooncake cannot register {self.nbytes} bytes")

    def unregister(self) -> None:
        """The memory itself goes with the last view of it."""
        self._registry.unregister_memory(self.address)


class Regions:
    """All receive regions of a rank. Safe to use from several threads."""

    def __init__(self, registry: Registry, layout: MessageLayout) -> None:
        self._registry = registry
        self._layout = layout
        self._lock = threading.Lock()
        self._given: dict[Member, tuple[Region, ...]] = {}
        self._retired: list[tuple[float, Region]] = []

    def give(self, source: Member, generation: int) -> Region:
        """The region of this generation; the same one when asked again. Raises ValueError where a
        later generation has been given."""
        with self._lock:
            regions = self._given.get(source, ())
            if regions and regions[0].generation == generation:
                return regions[0]
            if regions and regions[0].generation > generation:
                raise ValueError(f"{source} asks for generation {generation} of its region again")
            region = Region(self._registry, self._layout, generation)
            self._given[source] = (region, *regions)
            return region

    def of(self, source: Member) -> tuple[Region, ...]:
        """Its regions, newest first: a message may have landed before the link was opened anew."""
        return self._given.get(source, ())

    def retire(self, source: Member, now: float) -> None:
        """The source's record is gone: nobody reads its regions again."""
        with self._lock:
            self._retired += [(now, region) for region in self._given.pop(source, ())]

    def sweep(self, now: float) -> None:
        """Releases what has been in quarantine long enough."""
        with self._lock:
            due = [region for at, region in self._retired if now - at >= QUARANTINE_S]
            self._retired = [
                (at, region) for at, region in self._retired if now - at < QUARANTINE_S
            ]
        for region in due:
            region.unregister()
