"""A stream whose connection breaks is resumed after the last event that was read to its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from cli.bench.stream_client import LAST_EVENT_ID, StreamClient
from tests.support.fake_clock import FakeClock

TOKENS = [11, 12, 13, 14]


def event(index: int) -> bytes:
    end = "length" if index == len(TOKENS) - 1 else None
    choice = {"index": 0, "token_ids": [TOKENS[index]], "finish_reason": end}
    return f"id: e{index}\ndata: {json.dumps({'choices': [choice]})}\n\n".encode()


class Gateway:
    """Breaks each of the first `breaks` connections after an event and the id of the next one."""

    def __init__(self, breaks: int) -> None:
        self.breaks = breaks
        self.asked_after: list[str | None] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        after = request.headers.get(LAST_EVENT_ID)
        self.asked_after.append(after)
        response = web.StreamResponse()
        await response.prepare(request)
        first = 0 if after is None else int(after[1:]) + 1
        for index in range(first, len(TOKENS)):
            if index > first and len(self.asked_after) <= self.breaks:
                await response.write(event(index).partition(b"data")[0])
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(event(index))
            await asyncio.sleep(0)
        return response


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def serve(gateway: Gateway) -> tuple[web.AppRunner, str]:
    app = web.Application()
    app.router.add_post("/v1/completions", gateway.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def test_no_token_is_lost_or_doubled(http: aiohttp.ClientSession) -> None:
    gateway = Gateway(breaks=2)
    runner, url = await serve(gateway)
    try:
        client = StreamClient(http, url, "any", FakeClock())
        record = await client.run([1], len(TOKENS), resumes=True)
    finally:
        await runner.cleanup()
    assert (record.ids, record.error, record.resumed) == (TOKENS, None, 2)
    assert gateway.asked_after == [None, "e0", "e1"]


async def test_it_is_broken_if_nobody_asked_to_resume(http: aiohttp.ClientSession) -> None:
    runner, url = await serve(Gateway(breaks=1))
    try:
        record = await StreamClient(http, url, "any", FakeClock()).run([1], len(TOKENS))
    finally:
        await runner.cleanup()
    assert record.ids == TOKENS[:1]
    assert record.error is not None
    assert record.is_broken
