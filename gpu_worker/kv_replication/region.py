"""The memory that this rank gives to one incarnation of a source, for one generation of its
channel: slots for replicas of blocks, which the source writes. Knows nothing of their contents."""

from __future__ import annotations

import mmap
import weakref

import numpy as np

from gpu_worker.engine.kv_replication import Bytes
from gpu_worker.exchange.mooncake_engine import TransferEngine

SCRATCH_BYTES = 4096
"""Bytes after the last slot, for the write of first contact, which may arrive at any later time."""


class ReplicaRegion:
    """Registered anonymous memory. Its pages are not touched before something is written to them
    (over RDMA, registration touches them). Callers must not call it from two threads at once."""

    def __init__(
        self, engine: TransferEngine, *, generation: int, num_slots: int, block_bytes: int
    ) -> None:
        """Raises MemoryError."""
        self.generation = generation
        self.num_slots = num_slots
        nbytes = num_slots * block_bytes + SCRATCH_BYTES
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no {nbytes} bytes of address space: {error.strerror}") from error
        self._memory = np.frombuffer(memory, dtype=np.uint8)
        self._block_bytes = block_bytes
        self._engine = engine
        self._readings: dict[int, list[weakref.ref[_Reading]]] = {}
        self.address = int(self._memory.ctypes.data)
        if engine.register_memory(self.address, nbytes) != 0:
            raise MemoryError(f"Mooncake cannot register {nbytes} bytes")

    def read(self, slot: int) -> Bytes:
        """A view of the slot, uint8. The slot counts as being read as long as anything refers to
        the view or to a part of it."""
        begin = slot * self._block_bytes
        reading = _Reading(self._memory[begin : begin + self._block_bytes])
        others = [ref for ref in self._readings.get(slot, ()) if ref() is not None]
        self._readings[slot] = [*others, weakref.ref(reading)]
        return np.asarray(reading)

    def is_read(self, slot: int) -> bool:
        if any(ref() is not None for ref in self._readings.get(slot, ())):
            return True
        self._readings.pop(slot, None)
        return False

    def unregister(self) -> None:
        """The memory itself is freed with the last view of it."""
        self._engine.unregister_memory(self.address)


class _Reading:
    """The base of all arrays that come from one `read`: it exists as long as they do."""

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__
