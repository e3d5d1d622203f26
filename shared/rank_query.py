"""Asks ranks for their status on their control ports. A rank that does not answer in time is a
result, not an error."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

from shared.errors import WireError
from shared.handshake import Access, Caller, introduce
from shared.records import RankRecord
from shared.types import RankId, Role
from shared.wire import StatusQuery, StatusReply, encode, read_message

QUERY_TIMEOUT_S = 1.0


async def query_ranks(
    records: Iterable[RankRecord], access: Access, *, asker: str = "cli"
) -> dict[RankId, StatusReply | None]:
    """None for a rank that does not answer. `asker` is the kind of process that asks."""
    wanted = list(records)
    async with asyncio.TaskGroup() as tasks:
        asked = {
            record.rank: tasks.create_task(query_rank(record, access, asker)) for record in wanted
        }
    return {rank: task.result() for rank, task in asked.items()}


async def query_rank(
    record: RankRecord, access: Access, asker: str, timeout_s: float = QUERY_TIMEOUT_S
) -> StatusReply | None:
    caller = Caller(role=Role.CLI, name=f"{asker}-{os.getpid()}")
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(record.control_host, record.control_port)
            try:
                await introduce(caller, record, access, reader, writer)
                writer.write(encode(StatusQuery(nonce=1)))
                while (message := await read_message(reader)) is not None:
                    if isinstance(message, StatusReply):
                        return message if message.incarnation == record.incarnation else None
                return None
            finally:
                writer.transport.abort()
    except (OSError, WireError, TimeoutError):
        return None
