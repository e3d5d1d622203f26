"""How the pieces of a streamed answer reach the connection."""

from __future__ import annotations

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from gateway.api.stream_body import StreamBody, StreamResponse


class RecordingTransport:
    """Passes everything on to a transport, and keeps what is written."""

    def __init__(self, transport: object) -> None:
        self._transport = transport
        self.written: list[bytes] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))
        self._transport.write(data)  # type: ignore[attr-defined]


async def stream_of(pieces: list[bytes]) -> tuple[bytes, list[bytes]]:
    """What a client gets of a stream of these pieces, and the writes that it took."""
    writes: list[bytes] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        transport = RecordingTransport(request.transport)
        request.protocol.transport = transport  # type: ignore[assignment]
        response = StreamResponse(headers={"Content-Type": "text/event-stream"})
        body = StreamBody(request, response)
        await response.prepare(request)
        for number, piece in enumerate(pieces, start=1):
            await body.write(piece, last=number == len(pieces))
        writes.extend(transport.written)
        return response

    app = web.Application()
    app.router.add_get("/", answer)
    async with TestClient(TestServer(app)) as client, client.get("/") as response:
        return await response.read(), writes


async def test_the_headers_leave_with_the_first_events() -> None:
    body, writes = await stream_of([b"data: one\n\n", b"data: two\n\n"])
    assert body == b"data: one\n\ndata: two\n\n"
    assert len(writes) == 2
    assert writes[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"data: one\n\n" in writes[0]


async def test_a_stream_of_one_piece_is_one_write() -> None:
    body, writes = await stream_of([b"data: all\n\n"])
    assert body == b"data: all\n\n"
    assert len(writes) == 1
