"""Lets requests wait for their turn to be prepared: to have texts tokenised and templates rendered,
or, in turns of their own, grammars checked. `turn_queue` decides who is next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from gateway.api_keys import ApiKey
from gateway.session_state import Failure, FailureKind, SessionFailed
from gateway.turn_queue import Turn, TurnQueue

RUNNING_MAX = 4
"""Two threads tokenise; others render templates."""
GRAMMARS_RUNNING_MAX = 2
"""One process checks them, one after the other."""
GRAMMAR_RESTS = 3.0
"""Between two checks of a client while others are served: what is checked, ranks compile too."""
REST_MAX_S = 2.0
WAITING_MAX = 256
WAITING_BYTES_MAX = 64 << 20
"""Of bodies: what waits is kept in memory."""


def _for_everybody(key: ApiKey) -> bool:
    return True


class Preparation:
    """If it `rests`, so many times what a turn has taken passes before the next one, if it
    `rests_for` this client."""

    def __init__(
        self,
        running_max: int = RUNNING_MAX,
        *,
        rests: float = 0.0,
        rests_for: Callable[[ApiKey], bool] = _for_everybody,
    ) -> None:
        self._queue = TurnQueue(
            running_max=running_max, waiting_max=WAITING_MAX, waiting_cost_max=WAITING_BYTES_MAX
        )
        self._rests = rests
        self._rests_for = rests_for
        self._wakers: dict[Turn, asyncio.Event] = {}

    @property
    def num_waiting(self) -> int:
        return self._queue.num_waiting

    @asynccontextmanager
    async def turn(
        self, key: ApiKey, *, cost: float, timeout_s: float | None
    ) -> AsyncIterator[None]:
        """`cost` is in bytes of the request's body. Raises Overloaded, and SessionFailed if its
        turn does not come in time."""
        loop = asyncio.get_running_loop()
        turn = self._queue.ask(key, cost)
        began = loop.time()
        try:
            if not turn.is_granted:
                await self._wait(turn, timeout_s)
            began = loop.time()
            yield
        finally:
            if self._rests and turn.is_granted and self._rests_for(key):
                rest_s = min(self._rests * (loop.time() - began), REST_MAX_S)
                loop.call_later(rest_s, self._end, turn)
            else:
                self._end(turn)

    def _end(self, turn: Turn) -> None:
        self._wake(self._queue.give_up(turn))

    async def _wait(self, turn: Turn, timeout_s: float | None) -> None:
        waker = self._wakers[turn] = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await waker.wait()
        except TimeoutError:
            message = "the request's timeout was over before it could be prepared"
            raise SessionFailed(Failure(kind=FailureKind.DEADLINE, message=message)) from None
        finally:
            del self._wakers[turn]

    def _wake(self, turns: Iterable[Turn]) -> None:
        for turn in turns:
            self._wakers[turn].set()
