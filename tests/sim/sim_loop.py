"""An asyncio event loop on virtual time, whose callbacks belong to simulated processes that can be
killed, stopped or stalled between any two of them. Blocking work runs in greenlets that park."""

from __future__ import annotations

import asyncio
import contextvars
import random
import selectors
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

import greenlet

EXECUTOR_S = (0.001, 0.01, 0.3)
EXECUTOR_SLOW_S = (0.01, 0.3, 1.5)
"""What work off the event loop takes, such as reading experts or opening a link."""


@dataclass(eq=False)
class SimProcess:
    """A process of the simulated cluster: the owner of tasks, greenlets, listeners and
    connections."""

    name: str
    host: str
    dead: bool = False
    stopped: bool = False  # by SIGSTOP
    num_stalls: int = 0  # calls that hold Python's lock at present
    stopped_until: float = -inf  # of the last stop
    stalled_since: float = -inf  # of the present stall
    longest_stall_s: float = 0.0
    device_failed: bool = False
    exit_code: int | None = None  # None: killed, if it is dead
    parked: list[Callable[[], Any]] = field(default_factory=list)
    on_death: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_gated(self) -> bool:
        """Alive, and none of its callbacks may run."""
        return self.stopped or self.num_stalls > 0

    def __repr__(self) -> str:
        return f"<{self.name}>"


current_process: contextvars.ContextVar[SimProcess | None] = contextvars.ContextVar(
    "current_process", default=None
)


class _VirtualTimeSelector(selectors.BaseSelector):
    """A selector that never sees a file become ready: waiting is what moves the clock."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self._advance = advance
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return self._keys[fd]

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulated cluster has stopped: nothing is scheduled")
        self._advance(max(timeout, 0.0))
        return []

    def get_map(self) -> dict[int, selectors.SelectorKey]:  # type: ignore[override]
        return self._keys


class SimLoop(asyncio.SelectorEventLoop):
    """Time stands still while callbacks run and jumps to the next timer when none is ready."""

    def __init__(self) -> None:
        self._virtual_s = 1000.0
        super().__init__(_VirtualTimeSelector(self._pass_time))
        self.network: Any = None
        self.executor_s = EXECUTOR_S
        self._greenlets: set[Any] = set()

    def time(self) -> float:
        return self._virtual_s

    def _pass_time(self, seconds: float) -> None:
        # A timer counts as due only when the clock has passed it by the loop's resolution.
        self._virtual_s += seconds + (1e-9 if seconds else 0.0)

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        context = context or contextvars.copy_context()
        return super().call_soon(_gated(callback, args, context), context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        context = context or contextvars.copy_context()
        return super().call_at(when, _gated(callback, args, context), context=context)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """Threads do not exist here: the work is done some time later, in a greenlet that may
        park."""
        future = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - an executor passes on whatever it is
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        def work_in_greenlet() -> None:
            self.run_in_greenlet(work)

        self.call_later(random.choice(self.executor_s), work_in_greenlet)
        return future

    def run_in_greenlet(self, work: Callable[[], None]) -> None:
        """On the hub. `work` runs until it parks for the first time; the rest follows later."""

        def body() -> None:
            try:
                work()
            finally:
                self._greenlets.discard(one)

        one = greenlet.greenlet(body)
        one.gr_context = contextvars.copy_context()
        self._greenlets.add(one)  # one that is collected while parked would be run to its end
        one.switch()

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any
    ) -> Any:  # type: ignore[override]
        return await self.network.connect(protocol_factory, host, port)

    async def create_server(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any
    ) -> Any:  # type: ignore[override]
        return self.network.listen(protocol_factory, host, port)


def _gated(callback: Any, args: tuple[Any, ...], context: contextvars.Context) -> Callable[[], Any]:
    process = context.get(current_process)
    if process is None:
        return lambda: callback(*args)

    def run() -> Any:
        if process.dead:
            return None
        if process.is_gated:
            process.parked.append(lambda: callback(*args))
            return None
        return callback(*args)

    return run


def in_process(process: SimProcess) -> contextvars.Context:
    """A context in which whatever is scheduled belongs to `process`."""
    context = contextvars.copy_context()
    context.run(current_process.set, process)
    return context


def kill(process: SimProcess) -> None:
    """SIGKILL: not one more callback of it runs; the kernel closes what it had open. Nothing
    happens to one that has died before its agent heard of it."""
    if process.dead:
        return
    process.dead = True
    process.parked.clear()
    for hook in process.on_death:
        hook()


def stop(process: SimProcess) -> None:
    """SIGSTOP: its callbacks pile up."""
    process.stopped = True


def resume(process: SimProcess, loop: SimLoop) -> None:
    """SIGCONT: what piled up runs, in order."""
    process.stopped = False
    process.stopped_until = loop.time()
    _run_parked(process, loop)


def begin_stall(process: SimProcess, loop: SimLoop) -> None:
    """A call into the driver holds Python's lock: no thread of the process runs, but the kernel
    says that it does."""
    if not process.num_stalls:
        process.stalled_since = loop.time()
    process.num_stalls += 1


def end_stall(process: SimProcess, loop: SimLoop) -> None:
    process.num_stalls -= 1
    if not process.num_stalls:
        stalled_s = loop.time() - process.stalled_since
        process.longest_stall_s = max(process.longest_stall_s, stalled_s)
        _run_parked(process, loop)


def pause(process: SimProcess, loop: SimLoop, seconds: float) -> None:
    """Parks the greenlet that calls."""
    current = greenlet.getcurrent()
    loop.call_later(seconds, current.switch, context=in_process(process))
    current.parent.switch()


def pause_in_driver(
    process: SimProcess, loop: SimLoop, when_done: Callable[[Callable[[], None]], None]
) -> None:
    """Parks the greenlet that calls, with the process stalled, until the driver's call ends:
    `when_done` gets the function that says so. The device does not wait for a stopped process."""
    current = greenlet.getcurrent()

    def end() -> None:
        if not process.dead:
            end_stall(process, loop)
            loop.call_soon(current.switch, context=in_process(process))

    begin_stall(process, loop)
    outside_processes().run(when_done, end)
    current.parent.switch()


def outside_processes() -> contextvars.Context:
    """A context for what no signal to a process holds up, such as the work of a device."""
    context = contextvars.copy_context()
    context.run(current_process.set, None)
    return context


def _run_parked(process: SimProcess, loop: SimLoop) -> None:
    if process.is_gated:
        return
    parked, process.parked = process.parked, []
    context = in_process(process)
    for callback in parked:
        loop.call_soon(callback, context=context.copy())
