"""A JSON array that is encoded piece by piece, so that nobody waits for the whole of a long one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


class JsonList:
    def __init__(self, first: Sequence[Any] = ()) -> None:
        self._pieces: list[bytes] = []
        self.add(first)

    def add(self, items: Sequence[Any]) -> None:
        if items:
            self._pieces.append(msgspec.json.encode(items)[1:-1])

    def whole(self) -> bytes:
        return b"[" + b",".join(self._pieces) + b"]"
