"""Makes this process one of a release that does not exist yet: with this folder on PYTHONPATH,
Python runs this file first. STARFISH_FUTURE is `protocol_min,protocol` of that release. Its records
and messages have fields that we do not know, and it says things that we have no word for."""

from __future__ import annotations

import os
from typing import Any

import shared.codec as codec
import shared.release as release
import shared.version as version

release.PROTOCOL_MIN, release.PROTOCOL = map(int, os.environ["STARFISH_FUTURE"].split(","))
version.VERSION = "9.0.0"
_to_plain = codec.to_plain


def _with_unknown_fields(value: object) -> Any:
    plain = _to_plain(value)
    return plain | {"of_the_future": [1, {"two": b"3"}]} if isinstance(plain, dict) else plain


codec.to_plain = _with_unknown_fields

import shared.wire as wire  # noqa: E402  - it takes `to_plain` from the module above

_encode = wire.encode
_HANDSHAKE = (wire.Hello, wire.Challenge, wire.Proof, wire.Welcome)
_UNKNOWN = wire.pack_plain(["OfTheFuture", {"nonce": 1, "more": [b"", None]}])


def _after_an_unknown_kind(message: wire.Message) -> bytes:
    if isinstance(message, _HANDSHAKE):
        return _encode(message)
    return len(_UNKNOWN).to_bytes(wire.LENGTH_BYTES, "big") + _UNKNOWN + _encode(message)


wire.encode = _after_an_unknown_kind
