"""Keeps the outgoing links of this rank open: to each peer a control connection, a check that the
peer answers, and the first contact over the data network. Does not decide what a broken link
means."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from typing import Protocol

import structlog

from shared.errors import WireError
from shared.handshake import ANSWER_TIMEOUT_S, Access, expect, open_link
from shared.records import RankRecord
from shared.types import Epoch, GivenRegion, Member, Step
from shared.wire import Message, OpenRegion, Pong, RegionOpened, Wake, encode, read_message

log = structlog.get_logger()

CONTACT_TIMEOUT_S = 10.0
DATA_PATH_CHECK_S = 0.5
BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 1.0


class DataEndpoint(Protocol):
    """This rank's end of the data network. See `exchange.links.TransferEndpoint`."""

    @property
    def name(self) -> str: ...

    def next_generation(self, target: Member) -> int: ...

    def open_region(self, source: Member, generation: int) -> GivenRegion:
        """Memory for the peer `source` to write into."""
        ...

    def connect(self, region: RegionOpened, peer: RankRecord) -> None:
        """First contact, blocking. Raises ValueError, ConnectionError, TimeoutError."""
        ...

    @property
    def memory_links(self) -> tuple[Member, ...]:
        """Peers to which this rank writes through memory that both map."""
        ...

    def is_open(self, target: Member) -> bool:
        """Turns false when a later write fails."""
        ...

    def forget(self, member: Member) -> None:
        """The member's record is gone. Nothing of it is kept for good."""
        ...

    def sweep(self) -> None:
        """Frees what no late write can touch any more. Called every few seconds."""
        ...


class LinkKeeper:
    """One task per peer, from `open` to `close`."""

    def __init__(
        self,
        *,
        member: Member,
        access: Access,
        endpoint: DataEndpoint,
        contact: Callable[[], AbstractContextManager[None]],
        opened: Callable[[Member], None],
        broken: Callable[[Member, str], None],
        answered: Callable[[Member], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        """`opened`, `broken` and `answered` (a `Ping` that was sent to the peer) are called on the
        event loop. `contact()` is entered for as long as
        a first contact over the data network takes."""
        self._member = member
        self._access = access
        self._endpoint = endpoint
        self._contact = contact
        self._opened = opened
        self._broken = broken
        self._answered = answered
        self._tasks = tasks
        self._running: dict[Member, asyncio.Task[None]] = {}
        self._writers: dict[Member, asyncio.StreamWriter] = {}
        self._rechecks: dict[Member, asyncio.Event] = {}

    def open(self, peer: RankRecord) -> None:
        if peer.member not in self._running:
            self._running[peer.member] = self._tasks.create_task(self._keep(peer))

    def close(self, peer: Member) -> None:
        task = self._running.pop(peer, None)
        if task is not None:
            task.cancel()
        self._endpoint.forget(peer)

    def recheck(self, peer: Member) -> None:
        """A write to the peer may have failed: looks at once instead of after a while."""
        if peer in self._rechecks:
            self._rechecks[peer].set()

    def wake(self, peers: Iterable[Member], epoch: Epoch, step: Step) -> None:
        """Tells the peers that a step has work."""
        me = self._member
        self.send(Wake(rank=me.rank, incarnation=me.incarnation, epoch=epoch, step=step), peers)

    def send(self, message: Message, peers: Iterable[Member]) -> None:
        """To those of them whose link is open."""
        frame = encode(message)
        for peer in peers:
            writer = self._writers.get(peer)
            if writer is not None:
                writer.write(frame)

    async def _keep(self, peer: RankRecord) -> None:
        backoff_s = BACKOFF_MIN_S
        while True:
            try:
                async with self._open(peer) as reader:
                    backoff_s = BACKOFF_MIN_S
                    detail = await self._wait_until_broken(peer.member, reader)
            except (OSError, TimeoutError, ValueError, WireError) as error:
                detail = str(error) or type(error).__name__
            log_at_level = log.info if backoff_s == BACKOFF_MIN_S else log.debug
            log_at_level("link_broken", peer=str(peer.member), detail=detail)
            self._broken(peer.member, detail)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
            backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)

    @asynccontextmanager
    async def _open(self, peer: RankRecord) -> AsyncIterator[asyncio.StreamReader]:
        """Opens the link for as long as the context lasts; yields its control connection."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(peer.control_host, peer.control_port)
        try:
            region = await self._handshake(peer, reader, writer)
            with self._contact():
                async with asyncio.timeout(CONTACT_TIMEOUT_S):
                    await asyncio.to_thread(self._endpoint.connect, region, peer)
            self._writers[peer.member] = writer
            log.info("link_open", peer=str(peer.member))
            self._opened(peer.member)
            yield reader
        finally:
            self._writers.pop(peer.member, None)
            writer.close()

    async def _wait_until_broken(self, peer: Member, reader: asyncio.StreamReader) -> str:
        """Returns which has failed: the control connection or the data path."""
        recheck = self._rechecks[peer] = asyncio.Event()
        ended = asyncio.ensure_future(self._read(peer, reader))
        ended.add_done_callback(lambda _: recheck.set())
        try:
            while self._endpoint.is_open(peer):
                with suppress(TimeoutError):
                    async with asyncio.timeout(DATA_PATH_CHECK_S):
                        await recheck.wait()
                recheck.clear()
                if ended.done():
                    ended.result()
                    return "the control connection ended"
            return "a write over the data network failed"
        finally:
            del self._rechecks[peer]
            ended.cancel()

    async def _read(self, peer: Member, reader: asyncio.StreamReader) -> None:
        """Until the peer closes the connection. Raises WireError, ConnectionError."""
        while (message := await read_message(reader)) is not None:
            if not isinstance(message, Pong):
                raise WireError(f"{type(message).__name__} is not for who opened the link")
            self._answered(peer)

    async def _handshake(
        self, peer: RankRecord, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> RegionOpened:
        """Asks for a region to write to. The peer's event loop must have answered before the first
        contact over the data network, which would block for a minute if the peer hangs."""
        await open_link(peer, self._member, self._access, reader, writer)
        writer.write(
            encode(
                OpenRegion(
                    source=self._member,
                    transfer_name=self._endpoint.name,
                    generation=self._endpoint.next_generation(peer.member),
                )
            )
        )
        return await expect(reader, RegionOpened)
