"""The responses that a gateway remembers, so that a later request may follow one. In memory, and
bounded: what is older or larger is forgotten. Another gateway does not know them. They are kept as
JSON: as Python's objects, nested lists of a client's tools took forty times the memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """`output` (its items), `others` (its other fields) and `chat` are JSON. `owner` is the
    client's key, for whom alone it exists."""

    owner: str
    id: str
    output: bytes
    others: bytes
    chat: bytes

    @classmethod
    def of(
        cls,
        response: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        *,
        owner: str,
    ) -> StoredResponse:
        """`messages` is the whole chat, answer included, without instructions."""
        others = {key: value for key, value in response.items() if key != "output"}
        return cls(
            owner=owner,
            id=str(response["id"]),
            output=msgspec.json.encode(response["output"]),
            others=msgspec.json.encode(others),
            chat=msgspec.json.encode(messages),
        )

    @property
    def response(self) -> bytes:
        return self.others[:-1] + b',"output":' + self.output + b"}"

    @property
    def items(self) -> list[dict[str, Any]]:
        return msgspec.json.decode(self.output, type=list[dict[str, Any]])

    @property
    def messages(self) -> list[dict[str, Any]]:
        return msgspec.json.decode(self.chat, type=list[dict[str, Any]])

    @property
    def num_bytes(self) -> int:
        return len(self.output) + len(self.others) + len(self.chat)


class ResponseStore:
    """The last ones used stay, up to `bytes_max` of JSON."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, stored: StoredResponse) -> None:
        """One of the same id, whose stream was resumed and ended once more, is replaced."""
        if stored.num_bytes > self._bytes_max:
            return
        self._drop(stored.id)
        self._stored[stored.id] = stored
        self._num_bytes += stored.num_bytes
        while self._num_bytes > self._bytes_max:
            self._drop(next(iter(self._stored)))

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        found = self._stored.get(response_id)
        if found is None or found.owner != owner:
            return None
        self._stored.move_to_end(response_id)
        return found

    def delete(self, response_id: str, owner: str) -> bool:
        """Whether it was there."""
        if self.get(response_id, owner) is None:
            return False
        self._drop(response_id)
        return True

    def _drop(self, response_id: str) -> None:
        dropped = self._stored.pop(response_id, None)
        if dropped is not None:
            self._num_bytes -= dropped.num_bytes
