"""Opens the socket that clients connect to."""

from __future__ import annotations

import socket

from shared.errors import ConfigError

ADMIN_LISTEN_FLAGS = "--admin-port or --admin-host"
_BACKLOG = 1024


def listen_on(
    host: str, port: int, *, reuse_port: bool = False, flags: str = "--port or --host"
) -> socket.socket:
    """`reuse_port`: other sockets of this user that say so, too, may listen there at the same time,
    and the kernel gives each new connection to one of them. Raises ConfigError if this address is
    taken or is not ours; it names the `flags` that choose another one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=_BACKLOG, reuse_port=reuse_port
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); pass another {flags}"
        ) from error


def listen_alone(shared: socket.socket, port: int) -> socket.socket | None:
    """At the same address as `shared`, for this process alone; None if `port` is negative. Raises
    ConfigError."""
    return None if port < 0 else listen_on(str(shared.getsockname()[0]), port)


def inherited_listener(fd: int, *, flag: str = "--listen-fd") -> socket.socket:
    """Raises ConfigError, which names the `flag`, if `fd` is not a listening socket."""
    try:
        listener = socket.socket(fileno=fd)
        if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return listener
        listener.detach()  # somebody else's descriptor
    except OSError:
        pass
    raise ConfigError(f"{flag} {fd}: no listening socket was inherited under this number")
