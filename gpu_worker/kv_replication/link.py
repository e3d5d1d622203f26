"""The control connection of a channel: notifies the target of stored blocks and of slots to drop,
and receives its confirmations. Event loop only, except `notify`.

A message costs both ends far more than one more slot in it, and delays the engine's thread. So
notifications are collected: the fewer are pending, the longer they wait, up to the link's pace
after the last message.

After a message the link sends a Ping, one at a time. The target answers in order, so a Pong proves
that it has handled everything before it, and a missing Pong proves that it hangs."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable

from gpu_worker.kv_replication.channel import Channel
from shared.errors import WireError
from shared.types import Member
from shared.wire import (
    DropKvReplicas,
    KvReplicasDropped,
    KvReplicasStored,
    Message,
    Ping,
    Pong,
    encode,
    read_message,
)

PONG_TIMEOUT_S = 5.0
NOTIFY_AT_ONCE_MIN = 32
"""This many pending notifications are sent at once."""


class ReplicaLink:
    """`hold` runs it. `notify` may be called before."""

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
        self._is_notified = False
        self._notified_at = -math.inf
        self._notify_timer: asyncio.TimerHandle | None = None
        self._nonce = 0
        self._overdue: asyncio.TimerHandle | None = None
        self._asked: list[bytes] = []  # confirmed by the next Pong
        self._unconfirmed: list[bytes] = []  # confirmed by the Pong after that
        self._wants_pong = False

    def notify(self) -> None:
        """The channel has something to send. Any thread."""
        if not self._is_notified:
            self._is_notified = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                self._loop.call_soon_threadsafe(self._schedule_notify)

    async def hold(self, channel: Channel, reader: asyncio.StreamReader) -> str:
        """Runs until the connection ends or the channel has failed; returns the reason. The channel
        has failed then."""
        self._channel = channel
        try:
            self._send_pending()
            while (message := await read_message(reader)) is not None:
                self._on_message(channel, message)
            channel.fail("the control connection ended")
        except (OSError, WireError) as error:
            channel.fail(str(error) or type(error).__name__)
        finally:
            self._channel = None
            channel.fail("the link was closed")
            for timer in (self._overdue, self._notify_timer):
                if timer is not None:
                    timer.cancel()
        return channel.failure

    def _on_message(self, channel: Channel, message: Message) -> None:
        match message:
            case Pong(nonce=nonce) if nonce == self._nonce and self._overdue is not None:
                self._overdue.cancel()
                self._overdue = None
                channel.confirm_sent(self._asked)
                self._asked = []
                self._ask()
            case KvReplicasDropped(generation=generation, slots=slots) if (
                generation == channel.remote.generation
            ):
                channel.confirm_dropped(slots)
            case _:
                raise WireError(f"{type(message).__name__} was not asked for")

    def _schedule_notify(self) -> None:
        self._is_notified = False  # first: what is queued from now on notifies again
        channel = self._channel
        if channel is None:
            return
        pace_s = self._pace_s() * max(
            0.0, 1.0 - channel.num_pending_notifications / NOTIFY_AT_ONCE_MIN
        )
        due = self._notified_at + pace_s
        if self._notify_timer is not None:
            due = min(due, self._notify_timer.when())
            self._notify_timer.cancel()
            self._notify_timer = None
        if due <= self._loop.time() or not channel.is_open:
            self._send_pending()
        else:
            self._notify_timer = self._loop.call_at(due, self._send_pending)

    def _send_pending(self) -> None:
        self._notified_at, self._notify_timer = self._loop.time(), None
        channel = self._channel
        if channel is None:
            return
        if not channel.is_open:
            self._writer.transport.abort()
            return
        source, generation = self._source, channel.remote.generation
        if written := channel.take_written():
            slots, names, tags = zip(*written, strict=True)
            kept = KvReplicasStored(
                source=source, generation=generation, slots=slots, names=names, tags=tags
            )
            self._send(kept)
            self._unconfirmed += names
        if drops := channel.take_drops():
            self._send(DropKvReplicas(source=source, generation=generation, slots=tuple(drops)))
        self._ask()

    def _send(self, message: Message) -> None:
        self._write(message)
        self._wants_pong = True

    def _write(self, message: Message) -> None:
        if not self._writer.transport.is_closing():
            self._writer.write(encode(message))

    def _ask(self) -> None:
        """Sends a Ping if a message was sent since the last one, unless a Pong is still awaited."""
        if not self._wants_pong or self._overdue is not None:
            return
        self._nonce += 1
        self._write(Ping(nonce=self._nonce))
        self._wants_pong = False
        self._asked, self._unconfirmed = self._unconfirmed, []
        self._overdue = self._loop.call_later(self._pong_timeout_s, self._on_overdue)

    def _on_overdue(self) -> None:
        if self._channel is not None:
            self._channel.fail("it does not answer")
