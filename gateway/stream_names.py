"""Names of streams that can be resumed, made from the instance's secret so that every gateway of
the instance makes the same of them and none keeps anything. Pure.

A name is when the stream began and some random bytes. From it follow, each for itself, the answer's
id, its seed if the client gave none, and the keys by which ranks know its choices. What a client
gets of it is signed over what belongs to it: without the same request of the same client nothing
can be made of it, and only gateways make keys."""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from dataclasses import dataclass

_CREATED_BYTES, _RANDOM_BYTES, _SIGNATURE_BYTES = 4, 8, 9
_NAME_BYTES = _CREATED_BYTES + _RANDOM_BYTES
SPELT_CHARACTERS = (_NAME_BYTES + _SIGNATURE_BYTES) * 4 // 3
"""Length of a name as a client gets it: letters, digits, `-` and `_`."""


@dataclass(frozen=True, slots=True)
class StreamName:
    """`created` is in whole Unix seconds."""

    created: int
    random: bytes

    @property
    def plain(self) -> bytes:
        return self.created.to_bytes(_CREATED_BYTES) + self.random


class StreamNames:
    """`secret` is the instance's."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def new(self, wall: float) -> StreamName:
        """`wall` is the Unix time."""
        created = int(wall) % (1 << 8 * _CREATED_BYTES)
        return StreamName(created, secrets.token_bytes(_RANDOM_BYTES))

    def spell(self, name: StreamName, belongings: bytes) -> str:
        """For the client. `belongings` are whose stream it is and what was asked, which is not told
        to it again."""
        signed = name.plain + self._signature(name, belongings)
        return base64.urlsafe_b64encode(signed).decode()

    def read(self, spelt: str, belongings: bytes) -> StreamName | None:
        """None if it was not spelt here, or for something else."""
        try:
            signed = base64.b64decode(spelt, altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        plain, signature = signed[:_NAME_BYTES], signed[_NAME_BYTES:]
        name = StreamName(int.from_bytes(plain[:_CREATED_BYTES]), plain[_CREATED_BYTES:])
        if not hmac.compare_digest(signature, self._signature(name, belongings)):
            return None
        return name

    def answer_id(self, name: StreamName) -> str:
        """32 hexadecimal digits."""
        return self._derive(b"answer", name)[:16].hex()

    def seed(self, name: StreamName) -> int:
        """From 0 to 2**53 - 1: every language reads it in JSON as it is."""
        return int.from_bytes(self._derive(b"seed", name)[:8]) >> 11

    def key(self, name: StreamName, tenant: str, choice: int) -> bytes:
        """By which ranks know choice number `choice`: 16 bytes."""
        whose = b"%d\0%b" % (choice, tenant.encode())
        return self._derive(b"key", name, whose)[:16]

    def _signature(self, name: StreamName, belongings: bytes) -> bytes:
        return self._derive(b"signature", name, belongings)[:_SIGNATURE_BYTES]

    def _derive(self, purpose: bytes, name: StreamName, also: bytes = b"") -> bytes:
        spelt = b"stream\0" + purpose + b"\0" + name.plain + also
        return hmac.digest(self._secret, spelt, "sha256")
