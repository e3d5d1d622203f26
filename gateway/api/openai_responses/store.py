"""The responses that a gateway remembers, so that a later request may follow one. In memory, and
bounded: what is older or larger is forgotten. Another gateway does not know them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """`messages` is the whole chat, answer included, without instructions. `owner` is the client's
    key, for whom alone it exists."""

    owner: str
    response: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]


class ResponseStore:
    """The last ones used stay, up to `bytes_max` of JSON."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, stored: StoredResponse) -> None:
        size = len(msgspec.json.encode((stored.response, stored.messages)))
        if size > self._bytes_max:
            return
        self._stored[str(stored.response["id"])] = (stored, size)
        self._num_bytes += size
        while self._num_bytes > self._bytes_max:
            _, (_, dropped) = self._stored.popitem(last=False)
            self._num_bytes -= dropped

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        found = self._stored.get(response_id)
        if found is None or found[0].owner != owner:
            return None
        self._stored.move_to_end(response_id)
        return found[0]

    def delete(self, response_id: str, owner: str) -> bool:
        """Whether it was there."""
        if self.get(response_id, owner) is None:
            return False
        _, size = self._stored.pop(response_id)
        self._num_bytes -= size
        return True
