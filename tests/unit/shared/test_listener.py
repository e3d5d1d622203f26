"""Sockets that share a port, and one that does not."""

from __future__ import annotations

import contextlib
import socket

import pytest

from shared.errors import ConfigError
from shared.listener import listen_on

CLIENTS = 64


def test_connections_are_spread_over_those_that_share_the_port() -> None:
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(listen_on("127.0.0.1", 0, reuse_port=True))
        address = first.getsockname()
        second = opened.enter_context(listen_on(*address, reuse_port=True))
        for _ in range(CLIENTS):
            opened.enter_context(socket.create_connection(address))
        assert sorted(map(num_queued, (first, second)))[0] > 0


def num_queued(listener: socket.socket) -> int:
    """Accepts all connections that wait."""
    listener.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False)])
def test_both_must_agree_to_share(first: bool, second: bool) -> None:
    with listen_on("127.0.0.1", 0, reuse_port=first) as listener:
        address = listener.getsockname()
        with pytest.raises(ConfigError, match="cannot listen on"):
            listen_on(*address, reuse_port=second)
