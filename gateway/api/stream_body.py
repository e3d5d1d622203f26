"""The body of a streamed answer: how its pieces reach the client, and how long they may wait."""

from __future__ import annotations

import asyncio

from aiohttp import HttpVersion11, web

WRITE_TIMEOUT_S = 60.0
"""A client that reads nothing for this long counts as gone."""


class StreamResponse(web.StreamResponse):
    """Its headers wait for the first piece of its body, which is there when it is prepared, and
    leave in the same write."""

    _send_headers_immediately = False  # as that of the library's whole answers


class StreamBody:
    """Makes `response` one whose length is not known before."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self._response = response
        self._transport = request.transport
        if request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        self._has_begun = False

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """With the `last` ones the body ends, in the same write. Raises TimeoutError if the client
        reads nothing for WRITE_TIMEOUT_S, and ConnectionError if it is gone."""
        write = self._response.write_eof if last else self._response.write
        self._has_begun = self._has_begun or bool(data)
        if self._is_read():
            await write(data)  # cannot wait long, and a timeout costs more than the write
            return
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await write(data)

    @property
    def takes_more(self) -> bool:
        """Whether `write_now` may be called: the headers are on their way, the client is there, and
        it has read everything."""
        transport = self._transport
        return (
            self._has_begun
            and transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() == 0
        )

    def write_now(self, data: bytes) -> None:
        """As `write`, for what cannot wait for a task to be switched to: it goes past the HTTP
        library, in the form that this gives to a piece of a body."""
        assert self._transport is not None, "`takes_more` comes first"
        if data:
            framed = b"%x\r\n%b\r\n" % (len(data), data) if self._response.chunked else data
            self._transport.write(framed)

    def _is_read(self) -> bool:
        transport = self._request.transport
        return transport is not None and transport.get_write_buffer_size() == 0
