"""The thread that an engine runs on in a real rank."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from gpu_worker.engine.mailbox import ThreadWaiter


class EngineThread:
    """Implements `engine_client.EngineExecutor`. It is a daemon thread: an engine that waits for
    dead peers must not keep its process from ending."""

    def __init__(self) -> None:
        self.waiter = ThreadWaiter()
        self._cpu_clock: int | None = None

    def cpu_s(self) -> float:
        return time.clock_gettime(self._cpu_clock) if self._cpu_clock is not None else 0.0

    def start(self, run: Callable[[], None]) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def settle(error: BaseException | None) -> None:
            if ended.done():
                return
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        def body() -> None:
            error: BaseException | None = None
            self._cpu_clock = time.pthread_getcpuclockid(threading.get_ident())
            try:
                run()
            except BaseException as raised:  # noqa: BLE001 - it is raised again on the event loop
                error = raised
            self._cpu_clock = None
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, error)

        threading.Thread(target=body, name="engine", daemon=True).start()
        return ended
