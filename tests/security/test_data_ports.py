"""Mooncake believes whoever connects to it, and ends its process over a malformed frame. So another
user of a rank's host is not let in, whatever it says and however many connections it holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shared.confinement import confined_environment
from tests.support.buffer_process import PROGRAM, ROOT, BufferProcess
from tests.support.data_port_attack import (
    ABORTING,
    READ,
    data_frame,
    rpc_frame,
    say,
)

NOBODY = 65534
PEER_WRITE_S = 20  # a whole process, on a loaded machine; one held connection costs 5 s


@pytest.fixture
def buffer_process() -> Iterator[BufferProcess]:
    started = BufferProcess("127.0.0.1", confined_environment(os.environ, "127.0.0.1"))
    yield started
    started.stop()


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_user_of_the_host_is_told_nothing_and_keeps_nobody_out(
    buffer_process: BufferProcess,
) -> None:
    ports = [listener.port for listener in buffer_process.listeners]
    assert len(ports) == 2, "one for messages between engines, one for data"
    descriptors = num_descriptors(buffer_process.pid)
    attack = subprocess.Popen(
        [sys.executable, "-m", "tests.support.data_port_attack", str(NOBODY), *map(str, ports)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert attack.stdout is not None
        assert json.loads(attack.stdout.readline()) == {str(port): [] for port in ports}
        assert num_descriptors(buffer_process.pid) <= descriptors + 1
        assert buffer_process.is_intact()
        # The attacker still holds its connections: a peer gets in beside them.
        assert attack.poll() is None
        place = (str(buffer_process.port), str(buffer_process.address))
        peer = [*PROGRAM, "overwrite_buffer", "127.0.0.1", *place]
        written = subprocess.check_output(peer, cwd=ROOT, timeout=PEER_WRITE_S)
        assert json.loads(written)["status"] == 1
        assert not buffer_process.is_intact()
    finally:
        attack.communicate()


def test_the_own_user_is_let_in_and_can_read_memory(buffer_process: BufferProcess) -> None:
    """What the others are kept from. The port of messages tells where the memory is."""
    ports = {listener.port for listener in buffer_process.listeners}
    (data_port,) = ports - {buffer_process.port}
    assert b'"buffers"' in say(buffer_process.port, rpc_frame(1, b"{}"))
    found = say(data_port, data_frame(READ, buffer_process.address, 64))
    assert found == bytes([7]) * 64


def test_one_frame_of_the_own_user_ends_the_process(buffer_process: BufferProcess) -> None:
    """Which a host can do as well that no firewall keeps away."""
    assert say(buffer_process.port, rpc_frame(0, ABORTING[0])) == b""
    assert buffer_process.wait(timeout_s=10) == -signal.SIGABRT
