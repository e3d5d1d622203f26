"""Pages that are made for all who ask at once, and seldom."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from gateway.api.shared_rendering import RESTS, SharedRendering


async def test_a_page_is_made_after_it_was_asked_for_and_for_all_who_ask_together() -> None:
    made = itertools.count(1)
    pages = SharedRendering[int](lambda kind: next(made))
    assert await asyncio.gather(*[pages.page() for _ in range(50)]) == [1] * 50
    assert await pages.page() == 2


async def test_pages_leave_the_loop_to_others() -> None:
    def make(kind: str) -> str:
        time.sleep(0.01)
        return kind

    pages = SharedRendering[str](make)
    began = time.monotonic()
    await asyncio.gather(*[pages.page(kind) for kind in "abc"])
    assert time.monotonic() - began > 2 * RESTS * 0.01


async def test_who_leaves_takes_the_page_from_nobody() -> None:
    pages = SharedRendering[str](lambda kind: "page")
    leaving, staying = (asyncio.create_task(pages.page()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await staying == "page"


async def test_an_error_is_told_and_the_next_page_is_made() -> None:
    broken = [True]

    def make(kind: str) -> str:
        if broken:
            broken.pop()
            raise ZeroDivisionError
        return "page"

    pages = SharedRendering[str](make)
    with pytest.raises(ZeroDivisionError):
        await pages.page()
    assert await pages.page() == "page"
