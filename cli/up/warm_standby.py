"""A process which has imported everything and waits: it takes over at once when one of the services
that it stands by for has exited."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence

from shared.standby import begin

Process = asyncio.subprocess.Process
Spawn = Callable[[int], Awaitable[Process]]


class WarmStandby:
    """One process at a time. `spawn` starts it with the read end of the pipe by which it learns
    that it shall begin."""

    def __init__(self, spawn: Spawn) -> None:
        self._spawn = spawn
        self._process: Process | None = None
        self._begin_fd = -1
        self._is_taken = asyncio.Event()

    async def start(self) -> None:
        """Also in place of one that has exited. Raises OSError."""
        self.kill()
        self._is_taken.clear()
        begin_read, begin_write = os.pipe()
        try:
            self._process = await self._spawn(begin_read)
        except OSError:
            os.close(begin_write)
            raise
        finally:
            os.close(begin_read)
        self._begin_fd = begin_write

    async def until_gone(self) -> bool:
        """Whether the process has been taken; otherwise it has exited, or did not start."""
        if self._process is None:
            return self._is_taken.is_set()
        async with asyncio.TaskGroup() as tasks:
            waits = {
                tasks.create_task(self._is_taken.wait()),
                tasks.create_task(self._wait_for_exit(self._process)),
            }
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in waits:
                task.cancel()
        return self._is_taken.is_set()

    def take(self, words: Sequence[str]) -> Process | None:
        """Has the process begin what the words say, and hands it over. None if there is none that
        runs."""
        process, fd = self._process, self._begin_fd
        self._process, self._begin_fd = None, -1
        if process is None:
            return None
        self._is_taken.set()
        try:
            begin(fd, words)
        except BrokenPipeError:
            return None
        return process if process.returncode is None else None

    def kill(self) -> None:
        """It has no clients and holds nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        os.close(self._begin_fd)
        self._begin_fd = -1
        if process.returncode is None:
            process.kill()

    async def stop(self) -> None:
        """`kill`, and returns when it has exited."""
        process = self._process
        self.kill()
        if process is not None:
            await process.wait()

    @staticmethod
    async def _wait_for_exit(process: Process) -> None:
        await process.wait()
