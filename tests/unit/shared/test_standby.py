"""What a process that waits hears through its pipe."""

from __future__ import annotations

import os

import pytest

from shared.standby import begin, until_told_to_begin


async def test_it_hears_what_it_shall_do() -> None:
    hears, says = os.pipe()
    begin(says, ["7", "/var/log/a gateway.log"])
    assert await until_told_to_begin(hears) == ["7", "/var/log/a gateway.log"]


async def test_a_pipe_that_ends_says_that_it_never_will() -> None:
    hears, says = os.pipe()
    os.close(says)
    assert await until_told_to_begin(hears) == []


def test_one_that_has_exited_is_told_nothing() -> None:
    hears, says = os.pipe()
    os.close(hears)
    with pytest.raises(BrokenPipeError):
        begin(says, ["7"])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(says)
