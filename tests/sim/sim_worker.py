"""What replaces a rank's threads beside the engine: work done in greenlets, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import greenlet

from tests.sim.sim_loop import SimLoop, SimProcess, in_process


class GreenletWorker:
    """Implements `exchange.worker_thread.Worker`. The work may park."""

    def __init__(self, loop: SimLoop, process: SimProcess, start_s: Callable[[], float]) -> None:
        """`start_s`: how long a thread takes to wake up."""
        self._loop = loop
        self._process = process
        self._start_s = start_s
        self._queue: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._is_running = False

    def submit(self, work: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._queue.append((work, future))
        if not self._is_running:
            self._is_running = True
            self._loop.call_later(self._start_s(), self._start, context=in_process(self._process))
        return future

    def call(self, work: Callable[[], None]) -> None:
        current = greenlet.getcurrent()
        assert current.parent is not None, "the event loop would wait for itself"
        future = self.submit(work)
        future.add_done_callback(
            lambda _: self._loop.call_soon(current.switch, context=in_process(self._process))
        )
        current.parent.switch()
        future.result()

    def _start(self) -> None:
        self._loop.run_in_greenlet(self._run)

    def _run(self) -> None:
        while self._queue:
            work, future = self._queue.popleft()
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a worker passes on whatever it is
                future.set_exception(error)
            else:
                future.set_result(None)
        self._is_running = False


class InlineExecutor(Executor):
    """Readers of a checkpoint, one after the other in the greenlet of the load."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - an executor passes on whatever it is
            future.set_exception(error)
        return future
