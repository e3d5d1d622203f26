"""Accepts connections and hands over their sockets as they come. An event loop's own server with
TLS tells of a connection only when its handshake has ended, and never of those that do not end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import structlog

log = structlog.get_logger()

_AT_ONCE = 16
"""Connections accepted in one turn of the event loop."""
_RETRY_S = 1.0


class SocketAcceptor:
    """Owns the `listener`. `on_accepted` gets each connection's socket, which does not block, and
    the address of its other end."""

    def __init__(
        self,
        listener: socket.socket,
        on_accepted: Callable[[socket.socket, str], None],
        *,
        backlog: int,
    ) -> None:
        self._listener = listener
        self._on_accepted = on_accepted
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        listener.listen(backlog)
        self._watch()

    def close(self) -> None:
        """Accepts no more. Those that wait in the queue are for whoever else has the socket."""
        if self._retry is not None:
            self._retry.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    def _watch(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # as if there are no descriptors left: others may end soon
                log.error("accept_failed", detail=error.strerror, again_in_s=_RETRY_S)
                self._loop.remove_reader(self._listener.fileno())
                self._retry = self._loop.call_later(_RETRY_S, self._watch)
                return
            accepted.setblocking(False)
            self._on_accepted(accepted, str(address[0]))
