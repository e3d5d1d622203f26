"""A stranger outside the data network reaches neither a rank's listeners nor its memory. Every
check is made on an unconfined process too, where it must find the hole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from shared.confinement import confined_environment
from tests.support.buffer_process import PROGRAM, ROOT, BufferProcess

LIMIT_S = 60
CONNECT_PROGRAM = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).close()
    print("open")
except ConnectionRefusedError:
    print("refused")
"""


class Network(NamedTuple):
    namespace: str
    host: str  # this host's address on the stranger's network


@pytest.fixture(scope="module")
def stranger() -> Iterator[Network]:
    """A network namespace that is joined to this host by a veth pair."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = f"sf{os.getpid() % 100000}"
    third = os.getpid() % 250
    near, far = f"10.213.{third}.1", f"10.213.{third}.2"
    try:
        for command in (
            f"ip netns add {tag}",
            f"ip link add {tag}a type veth peer name {tag}b netns {tag}",
            f"ip addr add {near}/30 dev {tag}a",
            f"ip link set {tag}a up",
            f"ip -n {tag} addr add {far}/30 dev {tag}b",
            f"ip -n {tag} link set {tag}b up",
            f"ip -n {tag} link set lo up",
        ):
            subprocess.run(command.split(), check=True, capture_output=True, timeout=LIMIT_S)
        yield Network(tag, near)
    finally:
        subprocess.run(["ip", "link", "del", f"{tag}a"], capture_output=True, timeout=LIMIT_S)
        subprocess.run(["ip", "netns", "del", tag], capture_output=True, timeout=LIMIT_S)


def from_outside(network: Network, *command: str) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", network.namespace, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1]


def connect_command(host: str, port: int) -> list[str]:
    return [sys.executable, "-c", CONNECT_PROGRAM, host, str(port)]


def test_a_stranger_finds_every_port_closed_and_the_memory_stays(stranger: Network) -> None:
    buffer_process = BufferProcess("127.0.0.1", confined_environment(os.environ, "127.0.0.1"))
    try:
        assert buffer_process.listeners
        assert not any(listener.is_wildcard for listener in buffer_process.listeners)
        for listener in buffer_process.listeners:
            command = connect_command(stranger.host, listener.port)
            assert from_outside(stranger, *command) == "refused"
            here = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
            assert here.stdout.strip() == "refused"
            assert (
                subprocess.check_output(connect_command("127.0.0.1", listener.port)).strip()
                == b"open"
            )
        place = (stranger.host, str(buffer_process.port), str(buffer_process.address))
        assert (
            json.loads(from_outside(stranger, *PROGRAM, "overwrite_buffer", *place))["status"] < 0
        )
        assert buffer_process.is_intact()
    finally:
        buffer_process.stop()


def test_without_confinement_the_same_stranger_connects_and_overwrites(stranger: Network) -> None:
    buffer_process = BufferProcess(stranger.host, os.environ)
    try:
        for listener in buffer_process.listeners:
            assert listener.is_wildcard
            assert from_outside(stranger, *connect_command(stranger.host, listener.port)) == "open"
        assert buffer_process.is_intact()
        place = (stranger.host, str(buffer_process.port), str(buffer_process.address))
        assert (
            json.loads(from_outside(stranger, *PROGRAM, "overwrite_buffer", *place))["status"] == 1
        )
        assert not buffer_process.is_intact()
    finally:
        buffer_process.stop()


@pytest.mark.parametrize("confined", [True, False])
def test_a_process_finds_out_by_itself_whether_it_is_confined(confined: bool) -> None:
    code = (
        "import os\n"
        "from shared.confinement import require_confined\n"
        "from gpu_worker.exchange.mooncake_engine import Protocols, open_engine\n"
        "from shared.errors import ConfigError\n"
        "engine, _ = open_engine('127.0.0.1', Protocols.TCP, '')\n"
        "try:\n"
        "    require_confined()\n"
        "    print('confined', flush=True)\n"
        "except ConfigError:\n"
        "    print('exposed', flush=True)\n"
        "os._exit(0)\n"
    )
    environment = confined_environment(os.environ, "127.0.0.1") if confined else os.environ
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.stdout.strip() == ("confined" if confined else "exposed")
