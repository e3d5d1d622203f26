"""A process without descriptors says so once a second, and everything else as before."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Iterator

import pytest
import structlog
from structlog.testing import LogCapture

from shared.accept_errors import log_failed_accepts_once


@pytest.fixture
def lines() -> Iterator[LogCapture]:
    captured = LogCapture()
    structlog.configure(processors=[captured])
    yield captured
    structlog.reset_defaults()


async def test_accepts_that_fail_for_want_of_descriptors_are_one_line(lines: LogCapture) -> None:
    loop = asyncio.get_running_loop()
    log_failed_accepts_once(loop)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        reader, writer = await asyncio.open_connection(host, port)
        await reader.read()
        writer.close()
        await writer.wait_closed()
        connecting = asyncio.ensure_future(asyncio.open_connection(host, port))
        await asyncio.sleep(0)  # its socket is there, and one more would be too many
        lowest_free = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        await asyncio.sleep(0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    failed = [entry for entry in lines.entries if entry["event"] == "accept_failed"]
    assert len(failed) == 1
    assert "Too many open files" in failed[0]["detail"]
    reader, writer = await connecting
    assert await reader.read() == b"", "it is let in once there are descriptors again"
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


async def test_other_errors_are_told_as_before(
    lines: LogCapture, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    log_failed_accepts_once(loop)
    loop.call_exception_handler({"message": "something else"})
    assert "something else" in caplog.text
    assert lines.entries == []
