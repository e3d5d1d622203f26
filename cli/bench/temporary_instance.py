"""An instance that a benchmark starts for itself: `starfish up` in a separate process and a
temporary folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cli.bench.temporary_options import TemporaryInstanceOptions
from cli.run_dir import Target, read_state
from cli.up.stages import Stage
from shared.errors import Unavailable
from shared.free_ports import free_ports

_START_SLACK_S = 10.0  # the instance gives up first, and says why
_STOP_TIMEOUT_S = 40.0
_POLL_S = 0.2
_POLLS_PER_REPORT = 50


@contextlib.asynccontextmanager
async def temporary_instance(
    flags: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    keep_logs: Path | None = None,
    start_timeout_s: float = 600.0,
    on_progress: Callable[[str], None] = lambda text: None,
    parent: Path | None = None,
) -> AsyncIterator[Target]:
    """Runs while the context lasts, from a folder in `parent`. `on_progress` is told how far the
    start is. The processes get our environment plus `environment`. Their logs are copied to
    `keep_logs` before they stop. Raises Unavailable with the instance's own message if it does
    not start."""
    with tempfile.TemporaryDirectory(prefix="starfish-bench-", dir=parent) as folder:
        run_dir = Path(folder) / "run"
        log_path = Path(folder) / "up.log"
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cli", "up", "--no-demo", "--run-dir", str(run_dir)),
                *("--instance", f"bench-{os.getpid()}", "--port", str(free_ports(1)[0])),
                *("--timeout-s", str(start_timeout_s), *flags),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | dict(environment or {}),
            )
        try:
            timeout_s = start_timeout_s + _START_SLACK_S
            yield await _wait_until_started(process, run_dir, log_path, timeout_s, on_progress)
        finally:
            if keep_logs is not None and (run_dir / "logs").is_dir():
                shutil.copytree(run_dir / "logs", keep_logs, dirs_exist_ok=True)
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()


@contextlib.asynccontextmanager
async def temporary_instance_with_progress(
    options: TemporaryInstanceOptions,
    console: Console,
    title: str,
    *,
    flags: Sequence[str] = (),
    parent: Path | None = None,
    keep_logs: Path | None = None,
) -> AsyncIterator[Target]:
    """Shows on the console how far the start is. `flags` are more of `starfish up`. The instance's
    name says its kind and who started it, so that several can run at the same time. Raises
    Unavailable if it does not start."""
    name = f"bench-{'static-' if options.static else ''}{os.getpid()}"
    async with contextlib.AsyncExitStack() as stack:
        with Stage(console, title) as stage:
            target = await stack.enter_async_context(
                temporary_instance(
                    [*options.flags(), "--instance", name, *flags],
                    parent=parent,
                    keep_logs=keep_logs,
                    environment=options.environment(),
                    start_timeout_s=options.start_timeout_s,
                    on_progress=stage.update,
                )
            )
        yield target


async def _wait_until_started(
    process: asyncio.subprocess.Process,
    run_dir: Path,
    log: Path,
    timeout_s: float,
    on_progress: Callable[[str], None],
) -> Target:
    polls, said = 0, ""
    try:
        async with asyncio.timeout(timeout_s):
            while (state := read_state(run_dir)) is None:
                if process.returncode is not None:
                    raise Unavailable(_last_line(log) or "the instance did not start")
                line = _last_line(log)
                if line != said or polls % _POLLS_PER_REPORT == 0:
                    on_progress(f"{line or 'starting'} ({polls * _POLL_S:.0f} s)")
                    said = line
                await asyncio.sleep(_POLL_S)
                polls += 1
    except TimeoutError:
        raise Unavailable(
            f"the instance did not serve within {timeout_s:.0f} s: {_last_line(log)}"
        ) from None
    return state.target()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip().removeprefix("starfish: ") if lines else ""
