"""An asyncio event loop on virtual time, whose callbacks belong to simulated processes that can be
killed or stopped between any two of them, as a signal would."""

from __future__ import annotations

import asyncio
import contextvars
import random
import selectors
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
    stopped: bool = False
    exit_code: int | None = None  # None: killed, if it is dead
    parked: list[Callable[[], Any]] = field(default_factory=list)
    on_death: list[Callable[[], None]] = field(default_factory=list)

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
        """Threads do not exist here: the work is done some time later, in one go."""
        future = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:  # noqa: BLE001 - an executor passes on whatever it is
                future.set_exception(error)

        self.call_later(random.choice(self.executor_s), work)
        return future

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
        if process.stopped:
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
    """SIGKILL: not one more callback of it runs; the kernel closes what it had open."""
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
    parked, process.parked = process.parked, []
    context = in_process(process)
    for callback in parked:
        loop.call_soon(callback, context=context.copy())
