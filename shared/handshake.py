"""How a rank begins a control connection to a peer: it checks who answers, and that the peer is
ready to answer probes."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from shared.errors import WireError
from shared.records import RankRecord
from shared.types import Member
from shared.wire import Hello, Message, Ping, Pong, Welcome, encode, read_message

M = TypeVar("M", bound=Message)

ANSWER_TIMEOUT_S = 2.0


async def handshake(
    peer: RankRecord, own: Member, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Raises WireError if another incarnation answers, TimeoutError, ConnectionError."""
    writer.write(encode(Hello(role="rank", name=str(own))))
    welcome = await expect(reader, Welcome)
    if welcome.member != peer.member:
        raise WireError(f"{peer.control_host}:{peer.control_port} is not rank {peer.member}")
    writer.write(encode(Ping(nonce=0)))
    await expect(reader, Pong)


async def expect(
    reader: asyncio.StreamReader, kind: type[M], timeout_s: float = ANSWER_TIMEOUT_S
) -> M:
    """The next message. Raises WireError if it is of another kind or the stream ends, and
    TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        message = await read_message(reader)
    if not isinstance(message, kind):
        got = "the end of the stream" if message is None else type(message).__name__
        raise WireError(f"expected {kind.__name__}, got {got}")
    return message
