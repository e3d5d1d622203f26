"""The lifeline: an inherited pipe that nobody writes to. It reaches end of file when the process
that holds the write end is gone, however it ended. The process with the read end then stops too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


def watch_lifeline(fd: int, on_end: Callable[[], object]) -> None:
    """Calls `on_end` once, on the running event loop. With `fd < 0` there is no lifeline, and
    `on_end` is never called."""
    if fd < 0:
        return
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(fd)  # the end stays readable for ever
        on_end()

    loop.add_reader(fd, ended)
