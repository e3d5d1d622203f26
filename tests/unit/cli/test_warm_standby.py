"""A process that waits to take over, with real ones: `cat` says at the pipe's end what it was
told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from cli.up.warm_standby import WarmStandby

pytestmark = pytest.mark.timeout(20)


async def spawn_cat(begin_fd: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *("cat", f"/dev/fd/{begin_fd}"),
        stdout=asyncio.subprocess.PIPE,
        pass_fds=[begin_fd],
    )


async def said(process: asyncio.subprocess.Process) -> bytes:
    out, _ = await process.communicate()
    return out


@pytest_asyncio.fixture
async def standby() -> AsyncIterator[WarmStandby]:
    waiting = WarmStandby(spawn_cat)
    await waiting.start()
    yield waiting
    await waiting.stop()


async def test_the_process_that_is_taken_begins(standby: WarmStandby) -> None:
    process = standby.take(["7", "/log"])
    assert process is not None
    assert await standby.until_gone()
    assert await said(process) == b"7\0/log"


async def test_one_that_waits_for_the_end_learns_that_it_was_taken(standby: WarmStandby) -> None:
    gone = asyncio.ensure_future(standby.until_gone())
    await asyncio.sleep(0)
    process = standby.take(["7", "/log"])
    assert process is not None
    assert await gone
    assert await said(process) == b"7\0/log"


async def test_there_is_one_process_for_one_need(standby: WarmStandby) -> None:
    first = standby.take(["7", "/log"])
    assert standby.take(["7", "/log"]) is None
    await standby.start()
    second = standby.take(["7", "/log"])
    assert first is not None
    assert second is not None
    assert first.pid != second.pid
    assert [await said(first), await said(second)] == [b"7\0/log"] * 2


async def test_a_process_that_has_exited_cannot_take_over() -> None:
    async def spawn_true(begin_fd: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec("true", pass_fds=[begin_fd])

    waiting = WarmStandby(spawn_true)
    await waiting.start()
    assert not await waiting.until_gone()
    assert waiting.take(["7", "/log"]) is None


async def test_a_host_that_starts_no_process_keeps_no_pipe() -> None:
    async def fails(begin_fd: int) -> asyncio.subprocess.Process:
        raise OSError("no memory")

    waiting = WarmStandby(fails)
    with pytest.raises(OSError, match="no memory"):
        await waiting.start()
    assert waiting.take(["7", "/log"]) is None
