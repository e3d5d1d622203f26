"""The page of the admin API in a real browser: Debian's Chromium, without a window."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tests.support.admin_api import TOKEN

if TYPE_CHECKING:
    from playwright.async_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START_MS, WAIT_MS = 120_000, 60_000
"""A browser on a busy machine takes its time."""


@asynccontextmanager
async def opened(
    url: str, *, width: int = 1280, height: int = 900, dark: bool = False
) -> AsyncIterator[Page]:
    """A tab with the page. At the end it must have reached nothing but `url`, and complained of
    nothing."""
    from playwright.async_api import async_playwright, expect

    complaints: list[str] = []
    asked: list[str] = []
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=START_MS
        )
        try:
            page = await browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
            )
            page.set_default_timeout(WAIT_MS)
            expect.set_options(timeout=WAIT_MS)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.on(
                "console",
                lambda said: (
                    complaints.append(said.text) if "Content Security Policy" in said.text else None
                ),
            )
            await page.goto(url)
            yield page
        finally:
            await browser.close()
    assert complaints == []
    assert [each for each in asked if not each.startswith((url, "data:"))] == []


async def log_in(page: Page, token: bytes = TOKEN) -> None:
    await page.get_by_label("Admin token").fill(token.decode())
    await page.keyboard.press("Enter")
