"""What the agent says of a fork server that does not answer."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from node_agent import fork_client
from node_agent.fork_client import ForkClient, ForkServerCommand, ForkUnavailable
from shared.clock import SystemClock

READY_THEN_DEAF = """
import socket, sys, time
from shared.codec import pack
from shared.fork_server import CHANNEL_FLAG, ForkServerStatus
channel = socket.socket(fileno=int(sys.argv[sys.argv.index(CHANNEL_FLAG) + 1]))
if "deaf" not in sys.argv:
    channel.send(pack(ForkServerStatus(pid=1, done=1, total=1)))
channel.recv(1)
time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "server.py"
    path.write_text(READY_THEN_DEAF)
    return (sys.executable, str(path))


def _client(program: tuple[str, ...], *flags: str) -> ForkClient:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ForkServerCommand(program=program, flags=flags, environment=environment, pass_fds=())
    return ForkClient(command=command, clock=SystemClock())


async def _refusal(client: ForkClient) -> str:
    try:
        with pytest.raises((OSError, ForkUnavailable)) as raised:
            await client.fork(["gpu_worker"], None)
    finally:
        client.close()
    return str(raised.value)


def test_a_request_without_an_answer_says_for_how_long(
    program: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_client, "_FORK_TIMEOUT_S", 0.25)
    refusal = asyncio.run(_refusal(_client(program)))
    assert refusal == "the fork server failed: no answer within 0.25 s"


def test_a_server_that_never_is_ready_says_for_how_long(
    program: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_client, "_PREPARE_TIMEOUT_S", 0.25)
    refusal = asyncio.run(_refusal(_client(program, "deaf")))
    assert refusal == "the fork server does not start: no answer within 0.25 s"
