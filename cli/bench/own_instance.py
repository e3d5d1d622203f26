"""An instance that a benchmark starts for itself: `starfish up` in a process and a folder of its
own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from cli.run_dir import Target, read_state
from shared.errors import Unavailable

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 40.0
_POLL_S = 0.2


@contextlib.asynccontextmanager
async def own_instance(
    flags: Sequence[str], *, prefix_cache: bool = True, keep_logs: Path | None = None
) -> AsyncIterator[Target]:
    """Raises Unavailable with its words where it does not start. Its processes' logs are copied to
    `keep_logs` before it stops."""
    environment = os.environ | {"STARFISH_RANK_PREFIX_CACHE": str(prefix_cache).lower()}
    with tempfile.TemporaryDirectory(prefix="starfish-bench-") as folder:
        run_dir = Path(folder) / "run"
        with (Path(folder) / "up.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cli", "up", "--no-demo", "--run-dir", str(run_dir)),
                *("--instance", "bench", "--port", str(_free_port()), *flags),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        try:
            yield await _until_started(process, run_dir, Path(folder) / "up.log")
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


async def _until_started(process: asyncio.subprocess.Process, run_dir: Path, log: Path) -> Target:
    async with asyncio.timeout(_START_TIMEOUT_S):
        while (state := read_state(run_dir)) is None:
            if process.returncode is not None:
                raise Unavailable(_last_line(log))
            await asyncio.sleep(_POLL_S)
    return Target(etcd=state.etcd, instance=state.instance, url=state.url)


def _last_line(log: Path) -> str:
    words = log.read_text(errors="replace").strip().splitlines()
    return words[-1].removeprefix("starfish: ") if words else "the instance did not start"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
