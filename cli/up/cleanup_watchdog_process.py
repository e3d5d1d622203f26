"""The process of `cleanup_watchdog.py`: started with the pids that it must end, and replaced when
they change."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from pathlib import Path

from cli.up.run_folder import PARTS, RunFolder

_SCRIPT = Path(__file__).with_name("cleanup_watchdog.py")


class CleanupWatchdog:
    """After our end it removes `folder`, or only the parts that the run has created in one that a
    flag named; its logs stay, because they may say why we ended."""

    def __init__(self, lifeline_fd: int, folder: RunFolder) -> None:
        self._lifeline_fd = lifeline_fd
        self._folder_fd = folder.parent_fd if folder.is_default else folder.fd
        what = folder.path.name if folder.is_default else ",".join((*PARTS, "lock"))
        self._folder = f"{self._folder_fd}{'/' if folder.is_default else ':'}{what}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, pids: Iterable[int]) -> None:
        """`pids` are processes that do not hold the lifeline. Replaces an earlier start."""
        await self.stop()
        fd = self._lifeline_fd
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_SCRIPT), str(fd), self._folder, *map(str, pids)),
            pass_fds=[fd, self._folder_fd],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
