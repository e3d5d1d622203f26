"""One run of `starfish up`: who may have the name and the run folder, and what signals do to the
instance."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.run_dir import default_run_dir, read_state
from cli.up.instance_driver import InstanceDriver, url_of
from cli.up.name_lock import lock_name
from cli.up.options import UpOptions
from cli.up.run_folder import RunFolder
from cli.up.stages import Stages
from shared.clock import SystemClock
from shared.errors import ConfigError


async def run_up(options: UpOptions, console: Console) -> int:
    """Runs until SIGINT or SIGTERM and returns the exit code; a second signal ends everything at
    once. Raises StarfishError if the instance cannot start. Nothing is left behind either way."""
    options.check_values()
    refuse_second_instance(options)
    with _held_name(options, console):
        options.check()
        is_default = options.run_dir == default_run_dir(options.instance)
        folder = RunFolder(options.run_dir, is_default=is_default)
        return await _run_from(folder, options, console)


@contextlib.contextmanager
def _held_name(options: UpOptions, console: Console) -> Iterator[None]:
    """Raises ConfigError."""
    warn = Stages(console, SystemClock()).warn
    lock = lock_name(options.instance, options.run_dir, url_of(options), warn)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


async def _run_from(folder: RunFolder, options: UpOptions, console: Console) -> int:
    stop, up = asyncio.Event(), InstanceDriver(options, folder, console, SystemClock())

    def on_signal() -> None:
        if stop.is_set():
            up.kill_now()
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    failed = True
    try:
        if await run_unless_stopped(stop, up.start()):
            await run_unless_stopped(stop, up.serve())
        failed = False
        return 0 if up.is_serving else 130
    finally:
        await up.stop(keep_logs=failed)


def refuse_second_instance(options: UpOptions) -> None:
    """Raises ConfigError if the instance that owns this run folder still runs."""
    state = read_state(options.run_dir)
    if state is None or state.pid == os.getpid():
        return
    with contextlib.suppress(OSError):
        arguments = Path(f"/proc/{state.pid}/cmdline").read_bytes().split(b"\0")
        if b"up" in arguments:
            raise ConfigError(
                f"instance {state.instance!r} is already running from {options.run_dir} (pid "
                f"{state.pid}, {state.url}); stop it with Ctrl-C, or pass another --instance, "
                "--port and --run-dir"
            )


async def run_unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Returns whether the work ended before `stop` was set; otherwise cancels it."""
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(work)
        stopping = tasks.create_task(stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not working.done():
            working.cancel()
    return not working.cancelled()
