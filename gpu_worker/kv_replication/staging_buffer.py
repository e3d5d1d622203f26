"""The memory that blocks are saved to before they are written to a backup rank: a fixed number of
staging buffers, registered once and shared by all channels."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from gpu_worker.engine.kv_replication import Bytes
from gpu_worker.exchange.mooncake_engine import TransferEngine

log = structlog.get_logger()

NUM_STAGING_BUFFERS = 32
LOST_STAGING_BUFFERS_MAX = 64
"""The buffer of a write that timed out may be read at any later time and is never used again. Each
peer that hangs costs a few (`sender.WRITES_MAX`). More losses than this mean a lasting fault, and
replication stops rather than lose memory without end."""


class StagingBuffers:
    """The engine thread takes buffers, the sender's thread gives them back."""

    def __init__(self, make: Callable[[], Bytes], engine: TransferEngine) -> None:
        """`make` returns a new buffer for one block. Raises OSError if there is no memory for
        them."""
        self._make = make
        self._engine = engine
        self._lock = threading.Lock()
        self._num_missing = 0
        self._num_lost = 0
        self._free = [self._new() for _ in range(NUM_STAGING_BUFFERS)]

    def take(self) -> Bytes | None:
        """A buffer, or None if all are in use or too many were lost. Engine thread only, because
        `engine.kv_replication.BlockCache` makes buffers only there."""
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
        """A buffer that was taken is lost: a write that has timed out may still read it."""
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
