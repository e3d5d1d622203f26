"""Asks ranks for their status on their control ports. A rank that does not answer in time is a
result, not an error."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

from shared.errors import WireError
from shared.records import RankRecord
from shared.types import RankId
from shared.wire import Hello, StatusQuery, StatusReply, encode, read_message

QUERY_TIMEOUT_S = 1.0


async def query_ranks(records: Iterable[RankRecord]) -> dict[RankId, StatusReply | None]:
    """None for a rank that does not answer."""
    wanted = list(records)
    async with asyncio.TaskGroup() as tasks:
        asked = {record.rank: tasks.create_task(query_rank(record)) for record in wanted}
    return {rank: task.result() for rank, task in asked.items()}


async def query_rank(record: RankRecord, timeout_s: float = QUERY_TIMEOUT_S) -> StatusReply | None:
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(record.control_host, record.control_port)
            try:
                writer.write(encode(Hello(role="cli", name=f"cli-{os.getpid()}")))
                writer.write(encode(StatusQuery(nonce=1)))
                while (message := await read_message(reader)) is not None:
                    if isinstance(message, StatusReply):
                        return message if message.incarnation == record.incarnation else None
                return None
            finally:
                writer.transport.abort()
    except (OSError, WireError, TimeoutError):
        return None
