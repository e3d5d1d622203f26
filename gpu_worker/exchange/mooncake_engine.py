"""The one place that configures, imports and opens Mooncake's TransferEngine."""

from __future__ import annotations

import os
from enum import Enum
from math import ceil
from typing import Protocol

from shared.config import LONGEST_LEARNT_SILENCE_MS
from shared.errors import ConfigError

# A write to a process that is gone for good must end soon; Mooncake's default is 30 s. But when it
# gives a connection up, it opens no other for a second, and so a pause must not make it do that if
# the paused process is not dead for it.
_WRITE_TIMEOUT_S = ceil(LONGEST_LEARNT_SILENCE_MS / 1000) + 2
_SETTINGS = {
    "MC_TCP_STATUS_TIMEOUT_SEC": str(_WRITE_TIMEOUT_S),
    "MC_TCP_PROGRESS_TIMEOUT_SEC": str(_WRITE_TIMEOUT_S),
    # One lane keeps the slices of a write in order, so that its tail arrives last.
    "MC_TCP_LANES_PER_PEER": "1",
    "MC_LOG_LEVEL": "ERROR",
}


class Protocols(Enum):
    """How Mooncake moves bytes."""

    TCP = "tcp"
    RDMA = "rdma"


class TransferEngine(Protocol):
    """The part of Mooncake's TransferEngine that we use. It returns codes and raises nothing."""

    def register_memory(self, buffer_addr: int, capacity: int) -> int:
        """0 is success."""
        ...

    def unregister_memory(self, buffer_addr: int, /) -> int: ...

    def transfer_submit_write(
        self, target_hostname: str, buffer: int, peer_buffer_address: int, length: int
    ) -> int:
        """A batch to poll, or 0 if the write cannot start."""
        ...

    def transfer_check_status(self, batch: int, /) -> int:
        """1 done, 0 pending, -1 failed, -2 timed out. A batch must not be polled after a result
        other than 0."""
        ...

    def get_rpc_port(self) -> int: ...


def open_engine(host: str, protocol: Protocols, device: str) -> tuple[TransferEngine, str]:
    """A new engine and the name by which peers reach it. Raises ConfigError."""
    os.environ.update(_SETTINGS)
    if protocol is Protocols.TCP:
        os.environ["MC_FORCE_TCP"] = "1"
    try:
        from mooncake.engine import TransferEngine as MooncakeEngine
    except ImportError as error:
        raise ConfigError(
            f"Mooncake cannot be loaded ({error}): on Debian, run "
            "`apt-get install libibverbs1 libnuma1 libcurl4`"
        ) from error
    engine = MooncakeEngine()
    if engine.initialize(host, "P2PHANDSHAKE", protocol.value, device) != 0:
        raise ConfigError(f"Mooncake cannot open a {protocol.value} engine on {host}")
    opened: TransferEngine = engine
    return opened, f"{host}:{opened.get_rpc_port()}"
