"""A container's health check: what it asks, what it believes, and what it costs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from shared.health_check import CHALLENGE, HELLO, is_healthy
from shared.types import Incarnation, RankId, Role
from shared.wire import Challenge, Hello, encode
from tests.support.toy_rank import ToyRank

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def test_its_frames_are_those_of_the_protocol() -> None:
    hello = Hello(role=Role.CLI, name="healthcheck", instance="", nonce=b"")
    assert encode(hello) == HELLO
    challenge = Challenge(instance="i", rank=RankId(0), incarnation=Incarnation(1), nonce=b"n")
    assert encode(challenge)[4:].startswith(CHALLENGE)


async def test_a_rank_that_listens_is_healthy() -> None:
    rank = ToyRank(0)
    record = await rank.start()
    url = f"rank://127.0.0.1:{record.control_port}"
    assert await asyncio.to_thread(is_healthy, url)
    await rank.kill()
    assert not await asyncio.to_thread(is_healthy, url)


async def serving(answer: bytes) -> tuple[asyncio.Server, str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for at in range(0, len(answer), 5):
            writer.write(answer[at : at + 5])
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/health"


@pytest.mark.parametrize(
    ("answer", "healthy"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 20", False),
        (b"", False),
    ],
)
async def test_over_http_only_200_is_healthy(answer: bytes, healthy: bool) -> None:
    server, url = await serving(answer)
    async with server:
        assert await asyncio.to_thread(is_healthy, url) is healthy


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:1", "https://127.0.0.1:1/", "rank://host", "http://"]
)
def test_another_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="pass http://HOST:PORT/PATH or rank://HOST:PORT"):
        is_healthy(url)


def test_it_imports_next_to_nothing() -> None:
    """Containers run it for ever beside ranks."""
    code = "import shared.health_check, sys; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert not {"asyncio", "msgspec", "numpy", "ssl", "urllib.request"} & set(loaded)
