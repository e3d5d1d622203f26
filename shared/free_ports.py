"""TCP ports of this host for servers that bind them a little later, and again after a restart."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket

FIRST, END = 20_000, 32_000
"""Below those that the kernel gives to connections: one of these would be taken by whoever connects
to anybody before its server is there, and while that is restarted."""
_HOST = "127.0.0.1"
_TRIES = 1000


def free_ports(count: int) -> list[int]:
    """So many different ones, on which nobody listens now. Raises OSError if there are none."""
    draw = random.SystemRandom()  # processes that were seeded alike must not choose alike
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for _ in range(_TRIES):
            if len(found) == count:
                return found
            port = draw.randrange(FIRST, END)
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server((_HOST, port)))
                found.append(port)
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
