"""One connection to one incarnation of a rank, reopened until it is closed. It carries sessions and
probes. What a broken or silent link means is decided by its owner."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from shared.clock import Clock
from shared.errors import WireError
from shared.handshake import Access, Caller, introduce
from shared.records import RankRecord
from shared.types import Member, SuspicionReason, TenantName
from shared.wire import Cancel, Ping, Pong, Submit, Tokens, encode, read_message

CONNECT_TIMEOUT_S = 1.0
BACKOFF_MIN_S = 0.02
BACKOFF_MAX_S = 1.0
UNSENT_BYTES_MAX = 32 << 20
CONGESTED_BYTES = 4 << 20
"""With more than this unsent, whoever can wait does."""
STANDS_STILL_S = 1.0
"""Of more than UNSENT_BYTES_MAX, a rank that is there has taken some after this long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEvents:
    """Callbacks on the event loop. `broken` is also called for each failed attempt to connect."""

    opened: Callable[[RankRecord], None]
    tokens: Callable[[Member, Tokens], None]
    pong: Callable[[Member, Pong], None]
    broken: Callable[[Member, SuspicionReason, str], None]


class _Backlog(NamedTuple):
    taken_bytes: int
    since: float  # when it had taken so many


class RankLink:
    """`run` is its only task."""

    def __init__(
        self,
        *,
        record: RankRecord,
        caller: Caller,
        access: Access,
        events: LinkEvents,
        clock: Clock,
    ) -> None:
        self.record = record
        self.member = record.member
        self._caller = caller
        self._access = access
        self._events = events
        self._clock = clock
        self._writer: asyncio.StreamWriter | None = None
        self._nonces = itertools.count(1)
        self._tenants: tuple[TenantName, ...] = ()
        self.heard_at = clock.now()  # the last message
        self._probed_at: float | None = None  # time of the probe that has no answer yet
        self._sent_bytes = 0
        self._backlog: _Backlog | None = None  # while there is more than UNSENT_BYTES_MAX

    @property
    def is_congested(self) -> bool:
        return self._writer is not None and (
            self._writer.transport.get_write_buffer_size() > CONGESTED_BYTES
        )

    def send(self, message: Submit | Cancel) -> bool:
        """Returns False if the link is not open. The link breaks if the rank takes nothing of more
        than UNSENT_BYTES_MAX that are unsent."""
        if self._writer is None or self._writer.transport.is_closing():
            return False
        if self._is_stuck(self._writer.transport.get_write_buffer_size()):
            self._writer.transport.abort()
            return False
        frame = encode(message)
        self._sent_bytes += len(frame)
        self._writer.write(frame)
        return True

    def _is_stuck(self, unsent_bytes: int) -> bool:
        """Much to send is not the rank's fault: a death moves sessions of thousands of tokens."""
        if unsent_bytes <= UNSENT_BYTES_MAX:
            self._backlog = None
            return False
        now, total = self._clock.now(), self._sent_bytes - unsent_bytes
        if self._backlog is None or total > self._backlog.taken_bytes:
            self._backlog = _Backlog(total, now)
        return now - self._backlog.since > STANDS_STILL_S

    def probe(self, quiet_s: float) -> float:
        """Sends a Ping if nothing was received for `quiet_s` seconds and no Pong is outstanding.
        Returns for how many seconds a Pong has been outstanding."""
        now = self._clock.now()
        if self._writer is None or now - self.heard_at < quiet_s:
            return 0.0
        if self._writer.transport.is_closing():
            return 0.0
        if self._probed_at is None:
            self._ping(self._writer, now)
            return 0.0
        return now - self._probed_at

    def tell_tenants(self, tenants: tuple[TenantName, ...]) -> None:
        """Told again whenever the link opens."""
        self._tenants = tenants
        if self._writer is not None and not self._writer.transport.is_closing():
            self._ping(self._writer, self._clock.now())

    def _ping(self, writer: asyncio.StreamWriter, now: float) -> None:
        if self._probed_at is None:
            self._probed_at = now
        writer.write(encode(Ping(nonce=next(self._nonces), tenants=self._tenants)))

    def abort(self) -> None:
        """Breaks the connection, if there is one; then another is opened."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def run(self) -> None:
        """Connects, reads, and connects again, until cancelled."""
        backoff_s = BACKOFF_MIN_S
        while True:
            try:
                await self._connect_and_read()
                reason, detail = SuspicionReason.RESET, "the connection was closed"
            except TimeoutError:
                reason, detail = SuspicionReason.SILENCE, "no Welcome in time"
            except (OSError, WireError) as error:
                reason, detail = SuspicionReason.RESET, str(error) or type(error).__name__
            if self._writer is not None:
                self._writer = None
                backoff_s = BACKOFF_MIN_S
            self._events.broken(self.member, reason, detail)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
            backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)

    async def _connect_and_read(self) -> None:
        record = self.record
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(
                    record.control_host, record.control_port
                )
                await introduce(self._caller, record, self._access, reader, writer)
            self._writer, self._probed_at = writer, None
            self.heard_at = self._clock.now()
            self._ping(writer, self.heard_at)
            self._events.opened(record)
            await self._read(reader)
        finally:
            if writer is not None:
                # Drops unsent bytes: a hung peer must not keep the socket open.
                writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (message := await read_message(reader)) is not None:
            self.heard_at, self._probed_at = (
                self._clock.now(),
                None,
            )  # any message is a sign of life
            match message:
                case Tokens():
                    self._events.tokens(self.member, message)
                case Pong():
                    self._events.pong(self.member, message)
                case _:
                    raise WireError(f"{type(message).__name__} is not a message for a gateway")
