"""Asks ranks on their control ports for their status, or for what they have counted of their
experts. A rank that does not answer in time is a result, not an error."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from typing import TypeVar

from shared.errors import WireError
from shared.handshake import Access, Caller, introduce
from shared.records import RankRecord
from shared.types import RankId, Role
from shared.wire import (
    ExpertCounts,
    ExpertCountsQuery,
    StatusQuery,
    StatusReply,
    encode,
    read_message,
)

QUERY_TIMEOUT_S = 1.0

Reply = TypeVar("Reply", StatusReply, ExpertCounts)


async def query_ranks(
    records: Iterable[RankRecord], access: Access, *, asker: str = "cli"
) -> dict[RankId, StatusReply | None]:
    """None for a rank that does not answer. `asker` is the kind of process that asks."""
    return await _ask_all(records, access, asker, StatusQuery(nonce=1), StatusReply)


async def query_expert_counts(
    records: Iterable[RankRecord], access: Access, *, asker: str = "cli"
) -> dict[RankId, ExpertCounts | None]:
    """As `query_ranks`."""
    return await _ask_all(records, access, asker, ExpertCountsQuery(nonce=1), ExpertCounts)


async def _ask_all(
    records: Iterable[RankRecord],
    access: Access,
    asker: str,
    query: StatusQuery | ExpertCountsQuery,
    reply: type[Reply],
) -> dict[RankId, Reply | None]:
    async with asyncio.TaskGroup() as tasks:
        asked = {r.rank: tasks.create_task(_ask(r, access, asker, query, reply)) for r in records}
    return {rank: task.result() for rank, task in asked.items()}


async def _ask(
    record: RankRecord,
    access: Access,
    asker: str,
    query: StatusQuery | ExpertCountsQuery,
    reply: type[Reply],
) -> Reply | None:
    caller = Caller(role=Role.CLI, name=f"{asker}-{os.getpid()}")
    try:
        async with asyncio.timeout(QUERY_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(record.control_host, record.control_port)
            try:
                await introduce(caller, record, access, reader, writer)
                writer.write(encode(query))
                while (message := await read_message(reader)) is not None:
                    if isinstance(message, reply):
                        return message if message.incarnation == record.incarnation else None
                return None
            finally:
                writer.transport.abort()
    except (OSError, WireError, TimeoutError):
        return None
