"""The data network of KV replication: a Mooncake engine of its own, and first contact with peers.

The engine is not the exchange's, so that neither first contact with a peer nor a write to a peer
that hangs delays the exchange. Engine and registered memory are freed only with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import threading
from functools import partial

import numpy as np

from gpu_worker.exchange.connect_write import close_after_exit, connect_write
from gpu_worker.exchange.mooncake_engine import Protocols, open_engine
from gpu_worker.kv_replication.region import SCRATCH_BYTES
from shared.clock import Clock
from shared.errors import ConfigError
from shared.types import Member

CONTACT_TIMEOUT_S = 5.0


class DataTransport:
    """`name` is how peers address the engine."""

    def __init__(
        self, host: str, clock: Clock, *, protocol: Protocols = Protocols.TCP, device: str = ""
    ) -> None:
        """Mooncake binds its port on the calling thread. Raises ConfigError."""
        self.clock = clock
        self.engine, self.name = open_engine(host, protocol, device)
        self._scratch = np.frombuffer(mmap.mmap(-1, SCRATCH_BYTES), dtype=np.uint8)
        if self.engine.register_memory(int(self._scratch.ctypes.data), SCRATCH_BYTES) != 0:
            raise ConfigError("Mooncake cannot register memory")
        self._contact = asyncio.Lock()

    async def contact(self, target: Member, transfer_name: str, scratch_address: int) -> None:
        """First contact: writes `SCRATCH_BYTES` to an address of the target's. Raises
        ConnectionError, TimeoutError.

        The write runs on a daemon thread: if Mooncake blocks for a minute, nobody has to wait for
        it. There is one contact at a time, because it may block all other writes."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()
        async with asyncio.timeout(CONTACT_TIMEOUT_S):
            await self._contact.acquire()

        def settle(error: str) -> None:
            self._contact.release()
            if not ended.done():
                ended.set_result(error)

        def write() -> None:
            until = self.clock.now() + CONTACT_TIMEOUT_S
            submit = partial(self._submit, transfer_name, scratch_address)
            error = connect_write(self.engine, submit, self.clock, until)
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(settle, error)

        threading.Thread(target=write, name=f"kv-contact-{target}", daemon=True).start()
        async with asyncio.timeout(2 * CONTACT_TIMEOUT_S):
            error = await ended
        if error:
            raise ConnectionError(f"the first write to rank {target} {error}")

    def close_after_exit(
        self, transfer_name: str, scratch_address: int, control_address: tuple[str, int]
    ) -> None:
        """Closes the connection to a target that was contacted, if its process has ended. See
        `connect_write.close_after_exit`."""
        submit = partial(self._submit, transfer_name, scratch_address)
        close_after_exit(self.engine, submit, self.clock, control_address)

    def _submit(self, transfer_name: str, scratch_address: int) -> int:
        return self.engine.transfer_submit_write(
            transfer_name, int(self._scratch.ctypes.data), scratch_address, SCRATCH_BYTES
        )
