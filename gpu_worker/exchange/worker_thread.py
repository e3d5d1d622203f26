"""A thread of its own for calls that may stand still: one at a time, in the order of submission."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol


class Worker(Protocol):
    """`WorkerThread`, or a greenlet of the simulator."""

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Returns at once. The future ends with the work, or with what it raised."""
        ...

    def call(self, work: Callable[[], None]) -> None:
        """Returns when the work has ended. Raises what it raised."""
        ...


class WorkerThread:
    """Implements `Worker`. The thread starts with the first work and ends with the process."""

    def __init__(self, name: str, init_thread: Callable[[], None] = lambda: None) -> None:
        """`init_thread` is called once, on the thread, before any work."""
        self._executor = ThreadPoolExecutor(1, name, initializer=init_thread)

    def submit(self, work: Callable[[], None]) -> Future[None]:
        return self._executor.submit(work)

    def call(self, work: Callable[[], None]) -> None:
        self._executor.submit(work).result()
