"""Bodies of the admin API's requests and answers."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from aiohttp import web

from shared.errors import RequestError

RAW_BODY = web.RequestKey("raw_body", bytes)
"""Of a request that was let in: its body as it came, without its coding."""

_B = TypeVar("_B", bound=msgspec.Struct)


def decode(request: web.Request, kind: type[_B]) -> _B:
    """Raises RequestError. An empty body is an empty object."""
    try:
        return msgspec.json.decode(request[RAW_BODY] or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not what is asked for here: {error}") from error


def json_answer(value: msgspec.Struct, *, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type="application/json"
    )
