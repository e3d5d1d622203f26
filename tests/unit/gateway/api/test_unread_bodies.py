"""Bodies that nobody reads: their clients are answered at once, and the rest is taken slowly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from gateway.api.unread_bodies import UnreadBodies

BODY = b"x" * (1 << 20)
BYTES_PER_S = 4 << 20


async def refuse(request: web.Request) -> web.Response:
    return web.Response(status=401, text="no")


async def read(request: web.Request) -> web.Response:
    return web.Response(text=str(len(await request.read())))


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    app = web.Application(
        middlewares=[UnreadBodies(BYTES_PER_S).take], client_max_size=2 * len(BODY)
    )
    app.router.add_post("/", refuse)
    app.router.add_post("/read", read)
    runner = web.AppRunner(app, lingering_time=0.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


async def test_who_sends_first_and_then_listens_is_answered(url: str) -> None:
    async with aiohttp.ClientSession() as http:
        for _ in range(3):
            async with http.post(url, data=BODY) as response:
                assert (response.status, await response.text()) == (401, "no")
        async with http.post(url + "/read", data=BODY) as response:
            assert await response.text() == str(len(BODY))


@pytest.mark.parametrize("number", [1, 4])
async def test_all_together_send_no_more_than_so_much(url: str, number: int) -> None:
    """The next request of a connection waits for the end of its last body."""
    host, port = url.removeprefix("http://").split(":")

    async def attack() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            for _ in range(2):
                writer.write(
                    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)
                )
                writer.write(BODY)
                assert b" 401 " in await reader.readuntil(b"\r\n\r\nno")
        finally:
            writer.transport.abort()

    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(number):
            tasks.create_task(attack())
    least_s = 0.8 * number * len(BODY) / BYTES_PER_S  # what is on its way when it is answered
    assert least_s < time.monotonic() - began < 10 * least_s + 30


async def test_a_body_that_never_ends_is_no_reason_to_wait_with_the_answer(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.api.unread_bodies.LINGER_S", 3600.0)
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
    async with asyncio.timeout(30):
        assert b" 401 " in await reader.readuntil(b"\r\n\r\nno")
    writer.transport.abort()
