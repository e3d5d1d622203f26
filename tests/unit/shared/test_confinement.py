"""What counts as a listener on all interfaces, and the environment of a confined rank."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from shared.confinement import (
    BIND_VARIABLE,
    Listener,
    confined_environment,
    find_shim,
    listeners_of,
    parse_listeners,
)
from shared.errors import ConfigError

TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt uid inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1
   1: 00000000:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1
   2: 00000000:1F92 0100007F:0001 01 00000000:00000000 00:00000000 00000000     0        0 13 1
"""
ADDRESSES = [
    ("00000000000000000000000000000000", True),
    ("0000000000000000FFFF000000000000", True),
    ("0000000000000000FFFF00000100007F", False),
    ("00000000000000000000000001000000", False),
]


def test_only_listening_sockets_count_and_wildcards_are_told_apart() -> None:
    assert parse_listeners(TABLE) == [Listener(8080, 11, False), Listener(8081, 12, True)]


@pytest.mark.parametrize(("address", "is_wildcard"), ADDRESSES)
def test_wildcards_of_ipv6_are_known(address: str, is_wildcard: bool) -> None:
    table = f"head\n 0: {address}:0050 {'0' * 32}:0000 0A 0:0 00:0 0 0 0 9 1\n"
    assert parse_listeners(table) == [Listener(80, 9, is_wildcard)]


def test_a_process_sees_its_own_listeners() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        mine = [each for each in listeners_of("self") if each.port == port]
        assert [each.is_wildcard for each in mine] == [False]


def test_the_environment_keeps_what_it_had_and_adds_the_shim_in_front(tmp_path: Path) -> None:
    base = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "LD_PRELOAD": "/x/other.so", "A": "b"}
    once = confined_environment(base, "localhost")
    shim, other = once["LD_PRELOAD"].split(":")
    assert Path(shim).parent.parent == tmp_path
    assert other == "/x/other.so"
    assert once[BIND_VARIABLE] == "127.0.0.1"
    assert once["A"] == "b"
    assert confined_environment(once, "127.0.0.1") == once


@pytest.mark.parametrize("host", ["0.0.0.0", "no such host"])
def test_a_host_that_is_not_one_address_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        confined_environment({**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, host)


def test_without_a_compiler_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get install gcc libc6-dev"):
        find_shim({"XDG_CACHE_HOME": str(tmp_path)})


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "starfish").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="cannot write to"):
        find_shim({"XDG_CACHE_HOME": str(tmp_path)})
