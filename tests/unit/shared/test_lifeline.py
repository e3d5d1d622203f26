"""The end of the lifeline is told once."""

from __future__ import annotations

import asyncio
import os

from shared.lifeline import watch_lifeline


async def test_the_end_of_the_last_writer_is_told_once() -> None:
    read, write = os.pipe()
    ends: list[int] = []
    told = asyncio.Event()

    def on_end() -> None:
        ends.append(1)
        told.set()

    try:
        watch_lifeline(read, on_end)
        await asyncio.sleep(0)
        assert ends == []
        os.close(write)
        await told.wait()
        for _ in range(3):  # the pipe stays readable
            await asyncio.sleep(0)
        assert ends == [1]
    finally:
        os.close(read)


async def test_without_a_lifeline_nothing_is_watched() -> None:
    watch_lifeline(-1, lambda: None)
