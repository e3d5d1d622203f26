"""The control connection that goes with a channel: tells the target what stands in its slots and
what it shall forget, and hears that it has. Event loop only, but `ring`.

Each telling costs both ends far more than the news in it, and holds up the engine's thread, so they
are told together: the fewer there are, the later, up to the link's pace after the last ones.

After each message the target is asked for a Pong, one at a time: it answers in order, so that a
Pong proves that all before it was taken in, and one that does not come that the target hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable

from gpu_worker.kv_replication.channel import Channel
from shared.errors import WireError
from shared.types import Member
from shared.wire import (
    CopiesDropped,
    CopiesKept,
    DropCopies,
    Message,
    Ping,
    Pong,
    encode,
    read_message,
)

PONG_TIMEOUT_S = 5.0
TOLD_AT_ONCE = 32
"""So many news wait for nothing."""


class CopyLink:
    """`hold` runs it; `ring` may be called before."""

    def __init__(
        self,
        source: Member,
        writer: asyncio.StreamWriter,
        *,
        pace_s: Callable[[], float] = lambda: 0.0,
        pong_timeout_s: float = PONG_TIMEOUT_S,
    ) -> None:
        self._source = source
        self._pace_s = pace_s
        self._pong_timeout_s = pong_timeout_s
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._rung = False
        self._told_at = -math.inf
        self._telling: asyncio.TimerHandle | None = None
        self._nonce = 0
        self._overdue: asyncio.TimerHandle | None = None
        self._asked: list[bytes] = []  # known once the Pong is here
        self._untold: list[bytes] = []  # … once the next one is
        self._wants_pong = False

    def ring(self) -> None:
        """The channel has news. Any thread."""
        if not self._rung:
            self._rung = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                self._loop.call_soon_threadsafe(self._plan_telling)

    async def hold(self, channel: Channel, reader: asyncio.StreamReader) -> str:
        """Until the connection ends or the channel has failed; says which. The channel is closed
        then."""
        self._channel = channel
        try:
            self._on_news()
            while (message := await read_message(reader)) is not None:
                self._hear(channel, message)
            channel.fail("the control connection ended")
        except (OSError, WireError) as error:
            channel.fail(str(error) or type(error).__name__)
        finally:
            self._channel = None
            channel.fail("given up")
            for timer in (self._overdue, self._telling):
                if timer is not None:
                    timer.cancel()
        return channel.failure

    def _hear(self, channel: Channel, message: Message) -> None:
        match message:
            case Pong(nonce=nonce) if nonce == self._nonce and self._overdue is not None:
                self._overdue.cancel()
                self._overdue = None
                channel.confirm_sent(self._asked)
                self._asked = []
                self._ask()
            case CopiesDropped(generation=generation, slots=slots) if (
                generation == channel.remote.generation
            ):
                channel.confirm_dropped(slots)
            case _:
                raise WireError(f"{type(message).__name__} was not asked for")

    def _plan_telling(self) -> None:
        self._rung = False  # first: what is put there from now on rings again
        channel = self._channel
        if channel is None:
            return
        pace_s = self._pace_s() * max(0.0, 1.0 - channel.num_news / TOLD_AT_ONCE)
        due = self._told_at + pace_s
        if self._telling is not None:
            due = min(due, self._telling.when())
            self._telling.cancel()
            self._telling = None
        if due <= self._loop.time() or not channel.is_open:
            self._on_news()
        else:
            self._telling = self._loop.call_at(due, self._on_news)

    def _on_news(self) -> None:
        self._told_at, self._telling = self._loop.time(), None
        channel = self._channel
        if channel is None:
            return
        if not channel.is_open:
            self._writer.transport.abort()
            return
        source, generation = self._source, channel.remote.generation
        if written := channel.take_written():
            slots, names = zip(*written, strict=True)
            kept = CopiesKept(source=source, generation=generation, slots=slots, names=names)
            self._tell(kept)
            self._untold += names
        if drops := channel.take_drops():
            self._tell(DropCopies(source=source, generation=generation, slots=tuple(drops)))
        self._ask()

    def _tell(self, message: Message) -> None:
        self._write(message)
        self._wants_pong = True

    def _write(self, message: Message) -> None:
        if not self._writer.transport.is_closing():
            self._writer.write(encode(message))

    def _ask(self) -> None:
        """For a Pong, where something was told since the last Ping and none is under way."""
        if not self._wants_pong or self._overdue is not None:
            return
        self._nonce += 1
        self._write(Ping(nonce=self._nonce))
        self._wants_pong = False
        self._asked, self._untold = self._untold, []
        self._overdue = self._loop.call_later(self._pong_timeout_s, self._on_overdue)

    def _on_overdue(self) -> None:
        if self._channel is not None:
            self._channel.fail("it does not answer")
