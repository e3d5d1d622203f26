"""A process that has imported everything and waits until it is needed. Whoever started it writes
one byte to a pipe when it shall begin; the pipe's end says that it never will."""

from __future__ import annotations

import os

BEGIN = b"1"


def wait_to_begin(fd: int) -> bool:
    """Blocks. False if the pipe ended, as it does when its writer is gone."""
    return os.read(fd, 1) == BEGIN
