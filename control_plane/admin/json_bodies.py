"""Bodies of the admin API's requests and answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from shared.errors import RequestError

RAW_BODY = web.RequestKey("raw_body", bytes)
"""Of a request that was let in: its body as it came, without its coding."""

_B = TypeVar("_B", bound=msgspec.Struct)


def decode(request: web.Request, kind: type[_B]) -> _B:
    """Raises RequestError. An empty body is an empty object."""
    with _refusing_malformed():
        return msgspec.json.decode(request[RAW_BODY] or b"{}", type=kind)


def digest_of(name: str, request: web.Request) -> str:
    """Of all that a request asks for, its id apart. Its body has been decoded, but values of fields
    that are ignored are read only here. Raises RequestError if one cannot be."""
    with _refusing_malformed():
        fields = msgspec.json.decode(request[RAW_BODY] or b"{}", type=dict[str, Any])
        asked = {k: v for k, v in fields.items() if k != "request_id"}
        text = name.encode() + b" " + msgspec.json.encode(asked, order="deterministic")
    return hashlib.blake2b(text, digest_size=12).hexdigest()


@contextmanager
def _refusing_malformed() -> Iterator[None]:
    """Raises RequestError for what msgspec raises."""
    try:
        yield
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not what is asked for here: {error}") from error


def json_answer(value: msgspec.Struct, *, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type="application/json"
    )
