"""Ports for servers that begin later."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from shared import free_ports as module
from shared.free_ports import FIRST, free_ports


def test_they_differ_and_can_be_listened_on() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_no_connection_is_given_one_of_them() -> None:
    first_of_connections = int(
        Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]
    )
    if first_of_connections < module.END:
        pytest.skip("this machine gives more ports to connections than is usual")
    assert FIRST <= min(free_ports(20)) <= max(free_ports(20)) < first_of_connections


def test_processes_that_were_seeded_alike_choose_differently() -> None:
    chosen = []
    for _ in range(2):
        random.seed(7)
        chosen.append(free_ports(5))
    assert chosen[0] != chosen[1]


def test_a_taken_port_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(module, "FIRST", port)
        monkeypatch.setattr(module, "END", port + 1)
        with pytest.raises(OSError, match="in use"):
            free_ports(1)
