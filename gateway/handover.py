"""What becomes of a draining gateway's port: new connections must reach a gateway that serves, if
there is one."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from gateway.config import GatewayConfig

_LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""


def hand_over(config: GatewayConfig, shared: socket.socket) -> bool:
    """Whether somebody else serves the port from now on. Then this gateway is to close its socket:
    whoever holds it too, and was told so by `handover_fd`, has a successor take it over with the
    connections that wait in it; or other gateways have sockets of their own on this port."""
    if config.handover_fd >= 0:
        with contextlib.suppress(OSError):  # who would take over is gone
            os.write(config.handover_fd, b"%d\n" % os.getpid())
            return True
    return config.reuse_port and has_other_listener(shared)


def has_other_listener(own: socket.socket) -> bool:
    """Whether another socket of this network namespace listens at the same address and port, as
    only one of the same user can."""
    name = "tcp6" if own.family is socket.AF_INET6 else "tcp"
    own_inode = str(os.fstat(own.fileno()).st_ino)
    own_address = ""
    listening: list[tuple[str, str]] = []
    for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
        words = line.split()
        address, state, inode = words[1], words[3], words[9]
        if state == _LISTEN:
            listening.append((address, inode))
            if inode == own_inode:
                own_address = address
    return any(address == own_address and inode != own_inode for address, inode in listening)
