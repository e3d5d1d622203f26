"""Bodies in chunks of one byte: the event loop serves others between a few hundred of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest_asyncio
from aiohttp import web

from shared.errors import RequestError
from shared.request_body import READ_BYTES, read_body

NUM_CHUNKS = 20_000
BODY_BYTES_MAX = 25_000


class Server:
    def __init__(self) -> None:
        self.port = 0
        self.num_turns = 0

    async def turn(self) -> None:
        self.num_turns += 1
        await asyncio.sleep(0)

    async def read(self, request: web.Request) -> web.Response:
        try:
            raw = await read_body(request, BODY_BYTES_MAX, turn=self.turn)
        except RequestError as error:
            return web.Response(status=413, text=error.code)
        return web.Response(text=f"{len(raw.data)} of {set(raw.data.decode())}")

    async def post(self, header: str, body: bytes) -> str:
        """The text of the answer. The server may keep the connection for as long as the body has no
        end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(
                f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n\r\n".encode()
            )
            writer.write(body)
            async with asyncio.timeout(60):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"Content-Length: (\d+)", head)
                assert length is not None
                return (await reader.readexactly(int(length[1]))).decode()
        finally:
            writer.transport.abort()


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    served = Server()
    app = web.Application()
    app.router.add_post("/", served.read)
    runner = web.AppRunner(app, read_bufsize=READ_BYTES)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.port = runner.addresses[0][1]
    yield served
    await runner.cleanup()


async def test_small_chunks_are_read_a_few_hundred_in_a_turn(server: Server) -> None:
    body = b"1\r\na\r\n" * NUM_CHUNKS + b"0\r\n\r\n"
    assert await server.post("Transfer-Encoding: chunked", body) == f"{NUM_CHUNKS} of {{'a'}}"
    assert server.num_turns > NUM_CHUNKS / 600


async def test_a_body_of_a_known_length_needs_no_turns(server: Server) -> None:
    body = b"a" * NUM_CHUNKS
    assert await server.post(f"Content-Length: {NUM_CHUNKS}", body) == f"{NUM_CHUNKS} of {{'a'}}"
    assert server.num_turns == 0


async def test_chunks_without_end_are_too_large(server: Server) -> None:
    body = b"1\r\na\r\n" * (2 * BODY_BYTES_MAX)
    assert await server.post("Transfer-Encoding: chunked", body) == "request_too_large"
