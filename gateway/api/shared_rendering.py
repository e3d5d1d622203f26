"""Pages that take milliseconds to make, and that anybody may ask for: whoever asks while one is
being waited for shares it, and after each the event loop is for others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

RESTS = 20.0
"""After a page so many times what it has taken passes before the next one is made."""


class SharedRendering(Generic[T]):
    """A page is made after it was asked for, so it is never an old one. `kind` tells `make` which
    of a few pages is wanted."""

    def __init__(self, make: Callable[[str], T]) -> None:
        self._make = make
        self._wanted: dict[str, asyncio.Future[T]] = {}
        self._next_at = 0.0  # on the loop's clock
        self._is_due = False

    async def page(self, kind: str = "") -> T:
        """Raises what `make` raises."""
        loop = asyncio.get_running_loop()
        wanted = self._wanted.get(kind)
        if wanted is None:
            wanted = self._wanted[kind] = loop.create_future()
            if not self._is_due:
                self._is_due = True
                loop.call_at(max(loop.time(), self._next_at), self._make_next)
        return await asyncio.shield(wanted)  # one who leaves takes it from nobody

    def _make_next(self) -> None:
        """One, so that many kinds take no more of the loop than one does."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        kind = next(iter(self._wanted))
        wanted = self._wanted.pop(kind)
        try:
            wanted.set_result(self._make(kind))
        except Exception as error:  # noqa: BLE001 - it is raised where the page was asked for
            wanted.set_exception(error)
        self._next_at = loop.time() + RESTS * (loop.time() - began)
        self._is_due = bool(self._wanted)
        if self._is_due:
            loop.call_at(self._next_at, self._make_next)
