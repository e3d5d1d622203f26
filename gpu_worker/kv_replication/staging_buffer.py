"""The memory that blocks are saved into on their way to a backup rank: a fixed number of rooms,
registered once, shared by all channels."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from gpu_worker.engine.kv_replication import Bytes
from gpu_worker.exchange.mooncake_engine import TransferEngine

log = structlog.get_logger()

NUM_STAGING_BUFFERS = 32
LOST_STAGING_BUFFERS_MAX = 64
"""A staging_buffer of a write that timed out may be read at any later time and is never used
again. Each peer that hangs takes a few with it (`sender.WRITES_MAX`); more than so many lost rooms
point to something that does not heal, and memory is not given away without end."""


class StagingBuffers:
    """Taken by the engine thread, given back by the sender's."""

    def __init__(self, make: Callable[[], Bytes], engine: TransferEngine) -> None:
        """Raises OSError where there is no memory for them."""
        self._make = make
        self._engine = engine
        self._lock = threading.Lock()
        self._num_missing = 0
        self._num_lost = 0
        self._free = [self._new() for _ in range(NUM_STAGING_BUFFERS)]

    def take(self) -> Bytes | None:
        """None where all are in use, or too many were lost. Engine thread: `ports.BlockCache` makes
        rooms there alone."""
        with self._lock:
            if self._num_lost > LOST_STAGING_BUFFERS_MAX:
                return None
            if self._free:
                return self._free.pop()
            if self._num_missing == 0:
                return None
            self._num_missing -= 1
        try:
            return self._new()
        except OSError as error:
            self._give_up(str(error))
            return None

    def give_back(self, staging_buffer: Bytes) -> None:
        """No write reads it any more."""
        with self._lock:
            self._free.append(staging_buffer)

    def lose(self) -> None:
        """One that was taken may still be read, by a write that has timed out."""
        with self._lock:
            self._num_missing += 1
            self._num_lost += 1
            limit_reached = self._num_lost == LOST_STAGING_BUFFERS_MAX + 1
        if limit_reached:
            self._give_up(f"{self._num_lost} writes have timed out")

    def _give_up(self, detail: str) -> None:
        self._num_lost = LOST_STAGING_BUFFERS_MAX + 1
        log.error("kv_replication_disabled", detail=detail)

    def _new(self) -> Bytes:
        staging_buffer = self._make()
        if (
            self._engine.register_memory(int(staging_buffer.ctypes.data), staging_buffer.nbytes)
            != 0
        ):
            raise OSError(f"Mooncake cannot register {staging_buffer.nbytes} bytes")
        return staging_buffer
