"""What this rank is doing that may keep it from answering, and for how long at most. Its Pongs say
so, and the control plane waits that long before it judges the rank by silence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared.clock import Clock
from shared.config import LONGEST_ANNOUNCED_S
from shared.types import Operation
from shared.wire import AnnouncedOperation

FIRST_AT_MOST_S = 2.0
"""What an operation is expected to take at most before one of its kind has been measured."""
TIMES_LONGEST = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    operation: Operation
    at: float
    until: float


class Announcements:
    """On the event loop. An operation is announced before it begins, because it may hold Python's
    lock, so that nothing can be sent any more. Capturing graphs is not announced: a rank captures
    before it registers, and nobody judges it until then."""

    def __init__(self, clock: Clock, changed: Callable[[], None]) -> None:
        """`changed` is called when an operation begins or ends; what it sends is sent at once."""
        self._clock = clock
        self._changed = changed
        self._numbers = itertools.count()
        self._begun: dict[int, _Begun] = {}
        self._longest_s: dict[Operation, float] = {}

    def begin(self, operation: Operation) -> int:
        """Returns its number, for `end`."""
        now = self._clock.now()
        number = next(self._numbers)
        self._begun[number] = _Begun(
            operation=operation, at=now, until=now + self.at_most_s(operation)
        )
        self._changed()
        return number

    def end(self, number: int) -> None:
        """Its duration counts for the bound of the next one."""
        begun = self._begun.pop(number, None)
        if begun is None:
            return
        took_s = self._clock.now() - begun.at
        self._longest_s[begun.operation] = max(took_s, self._longest_s.get(begun.operation, 0.0))
        self._changed()

    @contextmanager
    def during(self, operation: Operation) -> Iterator[None]:
        number = self.begin(operation)
        try:
            yield
        finally:
            self.end(number)

    def at_most_s(self, operation: Operation) -> float:
        """How long an operation of this kind may take."""
        longest_s = TIMES_LONGEST * self._longest_s.get(operation, 0.0)
        return min(max(FIRST_AT_MOST_S, longest_s), LONGEST_ANNOUNCED_S)

    def current(self) -> tuple[AnnouncedOperation, ...]:
        """Those that have begun, but not those that have taken longer than they might."""
        now = self._clock.now()
        return tuple(
            AnnouncedOperation(operation=each.operation, at_most_ms=(each.until - now) * 1000)
            for each in self._begun.values()
            if each.until > now
        )
