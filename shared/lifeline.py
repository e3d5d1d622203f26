"""The lifeline: an inherited pipe that nobody writes to. It ends when its last writer is gone,
however that process ended, and with it shall end whoever holds the other side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


def watch_lifeline(fd: int, on_end: Callable[[], object]) -> None:
    """Calls `on_end` once, on the running event loop; never where there is no lifeline (fd < 0)."""
    if fd < 0:
        return
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(fd)  # the end stays readable for ever
        on_end()

    loop.add_reader(fd, ended)
