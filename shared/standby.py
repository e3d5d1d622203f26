"""A process that has imported everything and waits until it is needed. Whoever started it writes to
a pipe what it shall do when it shall begin; a pipe that ends without that says that it never
will."""

from __future__ import annotations

import os
from collections.abc import Sequence


def begin(fd: int, words: Sequence[str]) -> None:
    """Has the process at the other end begin, with at least one word. Closes `fd`. Raises
    BrokenPipeError if the process has exited."""
    assert words
    assert not any("\0" in word for word in words)
    with os.fdopen(fd, "wb", buffering=0) as pipe:
        pipe.write("\0".join(words).encode())


def wait_to_begin(fd: int) -> list[str]:
    """Blocks until the pipe ends, and returns the words; none if it shall never begin."""
    with os.fdopen(fd, "rb") as pipe:
        said = pipe.read().decode()
    return said.split("\0") if said else []
