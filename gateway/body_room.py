"""How many bytes of bodies may be on their way at once, of everybody and of each client: a body is
kept in memory from its first byte on, and its client may be in no hurry. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.api_keys import ApiKey
from shared.errors import Overloaded
from shared.fair_share import fits_share

ROOM_BYTES = 256 << 20
SMALL_BYTES = 64 << 10
"""A body of no more than this takes no more than its connection may anyway."""


class BodyRoom:
    """A client leaves some to others (`shared.fair_share`)."""

    def __init__(self, num_bytes: int = ROOM_BYTES) -> None:
        self._free = num_bytes
        self._used: Counter[str] = Counter()

    @contextmanager
    def taken(self, client: ApiKey, num_bytes: int) -> Iterator[None]:
        """As long as a body of at most so many bytes is read. Raises Overloaded."""
        if num_bytes <= SMALL_BYTES:
            yield
            return
        name, used = client.name, self._used[client.name]
        if not fits_share(used=used, added=num_bytes, free=self._free, weight=client.weight):
            raise Overloaded(
                "too many long bodies are on their way; retry later, or send shorter ones",
                retry_after_s=1,
            )
        self._free -= num_bytes
        self._used[name] += num_bytes
        try:
            yield
        finally:
            self._free += num_bytes
            self._used[name] -= num_bytes
            if not self._used[name]:
                del self._used[name]
