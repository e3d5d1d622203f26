"""Reads a request's body in time; and undoes gzip and deflate, never to more than the limit,
however small the body came."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import NamedTuple

from aiohttp import web

from shared.errors import RequestError

BODY_TIMEOUT_S = 60.0
READ_BYTES = 4096
"""A server's `read_bufsize`: of a connection, before it has to wait until its body is read. So some
256 chunks, if they are small, are parsed at a time, which takes half a millisecond; else everybody
waits for tens of thousands."""

MEMBERS_MAX = 256
"""Of a gzip file. Each costs a copy of what comes after it."""
_AUTO_WINDOW = 32 + zlib.MAX_WBITS  # takes the header of gzip or zlib


class ContentCoding(Enum):
    GZIP = "gzip"
    DEFLATE = "deflate"


class RawBody(NamedTuple):
    """As it came; `coding` is None if it is not coded."""

    data: bytes
    coding: ContentCoding | None


async def read_body(
    request: web.Request,
    bytes_max: int,
    *,
    timeout_s: float = BODY_TIMEOUT_S,
    turn: Callable[[], Awaitable[None]] | None = None,
) -> RawBody:
    """The application must not uncode bodies by itself. `turn` is awaited between the pieces of a
    body that comes in chunks: a chunk of one byte takes as long to read as one of thousands. Raises
    RequestError: 408, 413, 415, or 400."""
    if (request.content_length or 0) > bytes_max:
        raise body_too_large(bytes_max)
    coding = content_coding(*request.headers.getall("Content-Encoding", []))
    try:
        async with asyncio.timeout(timeout_s):
            if turn is None or request.content_length is not None:
                return RawBody(await request.read(), coding)
            return RawBody(await _read_chunks(request, bytes_max, turn), coding)
    except web.HTTPRequestEntityTooLarge as error:
        raise body_too_large(bytes_max) from error
    except TimeoutError as error:
        raise RequestError("the body did not arrive in time", code="request_timeout") from error


async def _read_chunks(
    request: web.Request, bytes_max: int, turn: Callable[[], Awaitable[None]]
) -> bytes:
    """Raises RequestError (413)."""
    body = bytearray()
    while not request.content.at_eof():
        body += await request.content.readany()
        if len(body) > bytes_max:
            raise body_too_large(bytes_max)
        await turn()
    return bytes(body)


async def uncoded(body: RawBody, bytes_max: int) -> bytes:
    """In a thread, if there is something to undo. Raises RequestError: 413 or 400."""
    if body.coding is None:
        return body.data
    return await asyncio.to_thread(decompress, body.data, body.coding, bytes_max)


def content_coding(*lines: str) -> ContentCoding | None:
    """`lines` of the header; several are one list. None: as it is. Raises RequestError (415) for
    what is not supported."""
    header = ", ".join(lines)
    name = header.strip().lower().removeprefix("x-")
    if name in ("", "identity"):
        return None
    try:
        return ContentCoding(name)
    except ValueError as error:
        raise RequestError(
            f"Content-Encoding {header[:40]!r} is not supported; send the body as it is, or as "
            "gzip or deflate",
            code="unsupported_content_encoding",
        ) from error


def decompress(raw: bytes, coding: ContentCoding, bytes_max: int) -> bytes:
    """Never makes more than `bytes_max` bytes. Raises RequestError: 413 beyond it, 400 if the body
    is not what `coding` says."""
    windows, members_max = [_AUTO_WINDOW], MEMBERS_MAX
    if coding is ContentCoding.DEFLATE:
        windows.append(-zlib.MAX_WBITS)  # some clients leave zlib's header out
        members_max = 1
    for window in windows:
        try:
            body = _members(raw, window, bytes_max, members_max)
        except zlib.error:
            continue
        if body is not None:
            return body
    raise RequestError(f"the body is not {coding.value}, as Content-Encoding says")


def _members(raw: bytes, window: int, bytes_max: int, members_max: int) -> bytes | None:
    """Those of a gzip file, joined. None if the last one is not whole, or if there are more. Raises
    RequestError (413), and zlib.error."""
    parts: list[bytes] = []
    left = bytes_max + 1  # never 0, which zlib takes for no limit
    for _ in range(members_max):
        decoder = zlib.decompressobj(window)
        parts.append(decoder.decompress(raw, left))
        left -= len(parts[-1])
        if left <= 0:
            raise body_too_large(bytes_max)
        raw = decoder.unused_data
        if not decoder.eof:
            return None
        if not raw:
            return b"".join(parts)
    return None


def body_too_large(bytes_max: int) -> RequestError:
    return RequestError(f"the body is larger than {bytes_max} bytes", code="request_too_large")
