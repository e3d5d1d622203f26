"""A child that says that it is about to end, with real ones."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import pytest

from cli.up.handovers import Handovers

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def handovers() -> Iterator[Handovers]:
    made = Handovers()
    yield made
    made.close()


async def child(handovers: Handovers, program: str) -> asyncio.subprocess.Process:
    """It may use `say`, and ends with its standard input."""
    fd = handovers.write_fd
    say = f"import os, sys; say = lambda: os.write({fd}, b'%d\\n' % os.getpid())"
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", f"{say}\n{program}"),
        stdin=asyncio.subprocess.PIPE,
        pass_fds=[fd],
    )


async def test_it_is_waited_for_until_it_says_so_or_has_exited(handovers: Handovers) -> None:
    silent = await child(handovers, "sys.stdin.read()")
    telling = await child(handovers, "say(); sys.stdin.read()")
    waiting = asyncio.ensure_future(handovers.until(silent))
    await handovers.until(telling)
    assert (telling.returncode, waiting.done()) == (None, False)
    silent.kill()
    await waiting
    assert silent.returncode is not None
    telling.kill()
    await telling.wait()


async def test_what_was_said_before_anybody_waited_is_known(handovers: Handovers) -> None:
    other = await child(handovers, "sys.stdin.read()")
    first = await child(handovers, "say(); sys.stdin.read()")
    waiting = asyncio.ensure_future(handovers.until(other))
    while first.pid not in handovers._said:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await handovers.until(first)
    assert first.returncode is None
    for each in (other, first):
        each.kill()
        await each.wait()
    await waiting
