"""A process that is prepared and waits until it is needed. Whoever started it writes to a pipe what
it shall do when it shall begin; a pipe that ends without that says that it never will."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

_READ_BYTES = 4096


def begin(fd: int, words: Sequence[str]) -> None:
    """Has the process at the other end begin, with at least one word. Closes `fd`. Raises
    BrokenPipeError if the process has exited."""
    assert words
    assert not any("\0" in word for word in words)
    with os.fdopen(fd, "wb", buffering=0) as pipe:
        pipe.write("\0".join(words).encode())


async def until_told_to_begin(fd: int) -> list[str]:
    """The words, once the pipe has ended; none if it shall never begin. Closes `fd`."""
    loop, readable, said = asyncio.get_running_loop(), asyncio.Event(), b""
    loop.add_reader(fd, readable.set)
    try:
        while True:
            await readable.wait()
            readable.clear()
            part = os.read(fd, _READ_BYTES)
            if not part:
                return said.decode().split("\0") if said else []
            said += part
    finally:
        loop.remove_reader(fd)
        os.close(fd)
