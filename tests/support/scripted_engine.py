"""A fake of the data network: a write arrives, and ends, when the test says so."""

from __future__ import annotations

import ctypes
from typing import NamedTuple


class Write(NamedTuple):
    source: int
    target: int
    length: int


class ScriptedEngine:
    """Implements `exchange.mooncake_engine.TransferEngine`. Batches are numbered from 1."""

    def __init__(self) -> None:
        self.registered: set[int] = set()
        self.writes: dict[int, Write] = {}
        self.under_way: set[int] = set()
        self.refuses = False
        self._status: dict[int, int] = {}

    def register_memory(self, buffer_addr: int, capacity: int) -> int:
        self.registered.add(buffer_addr)
        return 0

    def unregister_memory(self, buffer_addr: int, /) -> int:
        self.registered.remove(buffer_addr)
        return 0

    def transfer_submit_write(
        self, target_hostname: str, buffer: int, peer_buffer_address: int, length: int
    ) -> int:
        if self.refuses:
            return 0
        batch = len(self.writes) + 1
        self.writes[batch] = Write(buffer, peer_buffer_address, length)
        self._status[batch] = 0
        self.under_way.add(batch)
        return batch

    def transfer_check_status(self, batch: int, /) -> int:
        status = self._status[batch]
        if status != 0:
            del self._status[batch]  # a terminal answer comes once
        return status

    def get_rpc_port(self) -> int:
        return 0

    def land(self, batch: int) -> None:
        """The bytes arrive, whether or not the source ever learns it."""
        write = self.writes[batch]
        ctypes.memmove(write.target, write.source, write.length)

    def end(self, batch: int, status: int = 1) -> None:
        self.under_way.remove(batch)
        self._status[batch] = status
