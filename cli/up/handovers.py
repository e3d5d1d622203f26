"""Services that say that they are about to end, so that a successor takes over while they finish
what they have: each writes its process id to one pipe, which all of them inherit."""

from __future__ import annotations

import asyncio
import contextlib
import os

_READ_BYTES = 4096


class Handovers:
    """Call `close` at the end."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._half_line = b""
        self._said: dict[int, asyncio.Event] = {}  # by pid
        self._num_waiting = 0

    async def until(self, child: asyncio.subprocess.Process) -> None:
        """Until the child has said so, or has exited."""
        loop = asyncio.get_running_loop()
        said = self._said.setdefault(child.pid, asyncio.Event())
        self._num_waiting += 1
        loop.add_reader(self._read_fd, self._on_readable)
        try:
            async with asyncio.TaskGroup() as tasks:
                waits = {
                    tasks.create_task(said.wait()),
                    tasks.create_task(_until_exit(child)),
                }
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for task in waits:
                    task.cancel()
        finally:
            del self._said[child.pid]
            self._num_waiting -= 1
            if not self._num_waiting and self._read_fd >= 0:
                loop.remove_reader(self._read_fd)

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            *lines, self._half_line = (self._half_line + os.read(self._read_fd, _READ_BYTES)).split(
                b"\n"
            )
            for line in lines:
                self._said.setdefault(int(line), asyncio.Event()).set()

    def refuse(self) -> None:
        """Nobody takes over any more: who says that it ends gets a broken pipe, and keeps what it
        has."""
        if self._num_waiting:
            asyncio.get_running_loop().remove_reader(self._read_fd)
        if self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd = -1

    def close(self) -> None:
        self.refuse()
        os.close(self.write_fd)


async def _until_exit(child: asyncio.subprocess.Process) -> bool:
    await child.wait()
    return True
