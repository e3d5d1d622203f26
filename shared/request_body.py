"""Reads a request's body in time; and undoes gzip and deflate, never to more than the limit,
however small the body came."""

from __future__ import annotations

import asyncio
import zlib
from enum import Enum
from typing import NamedTuple

from aiohttp import web

from shared.errors import RequestError

BODY_TIMEOUT_S = 60.0

_AUTO_WINDOW = 32 + zlib.MAX_WBITS  # takes the header of gzip or zlib


class ContentCoding(Enum):
    GZIP = "gzip"
    DEFLATE = "deflate"


class RawBody(NamedTuple):
    """As it came; `coding` is None if it is not coded."""

    data: bytes
    coding: ContentCoding | None


async def read_body(
    request: web.Request, bytes_max: int, *, timeout_s: float = BODY_TIMEOUT_S
) -> RawBody:
    """The application must not uncode bodies by itself. Raises RequestError: 408, 413, 415, or
    400."""
    if (request.content_length or 0) > bytes_max:
        raise body_too_large(bytes_max)
    coding = content_coding(request.headers.get("Content-Encoding", ""))
    try:
        async with asyncio.timeout(timeout_s):
            return RawBody(await request.read(), coding)
    except web.HTTPRequestEntityTooLarge as error:
        raise body_too_large(bytes_max) from error
    except TimeoutError as error:
        raise RequestError("the body did not arrive in time", code="request_timeout") from error


async def uncoded(body: RawBody, bytes_max: int) -> bytes:
    """In a thread, if there is something to undo. Raises RequestError: 413 or 400."""
    if body.coding is None:
        return body.data
    return await asyncio.to_thread(decompress, body.data, body.coding, bytes_max)


def content_coding(header: str) -> ContentCoding | None:
    """None: as it is. Raises RequestError (415) for what is not supported."""
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
    windows = [_AUTO_WINDOW]
    if coding is ContentCoding.DEFLATE:
        windows.append(-zlib.MAX_WBITS)  # some clients leave zlib's header out
    for window in windows:
        decoder = zlib.decompressobj(window)
        try:
            body = decoder.decompress(raw, bytes_max + 1)
        except zlib.error:
            continue
        if len(body) > bytes_max:
            raise body_too_large(bytes_max)
        if decoder.eof and not decoder.unused_data:
            return body
    raise RequestError(f"the body is not {coding.value}, as Content-Encoding says")


def body_too_large(bytes_max: int) -> RequestError:
    return RequestError(f"the body is larger than {bytes_max} bytes", code="request_too_large")
