"""The mixed load of a soak, against a small gateway: what becomes of each kind of request."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from cli.bench.chaos.statistics import Damage
from cli.bench.soak.load import LoadCount, SoakLoad
from cli.bench.soak.requests import RequestKind, soak_requests
from cli.bench.stream_client import StreamClient
from shared.clock import SystemClock
from shared.errors import Unavailable

NEW_TOKENS = 4
REQUESTS = soak_requests(1, NEW_TOKENS, 16)


class Gateway:
    """Answers the same request with the same tokens. Once `is_broken`, guided answers have a wrong
    token in the middle, and long prompts are refused."""

    def __init__(self) -> None:
        self.is_broken = False
        self.salts: list[str | None] = []
        self.num_left = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.salts.append(body.pop("cache_salt", None))
        ids = random.Random(json.dumps(body)).sample(range(1000), NEW_TOKENS)
        if self.is_broken and len(body.get("prompt", ())) == 16:
            return web.json_response({"error": {}}, status=503)
        if self.is_broken and "response_format" in body:
            ids[1] = 1000
        response = web.StreamResponse()
        try:
            await response.prepare(request)
            for number, token in enumerate(ids):
                end = "length" if number == NEW_TOKENS - 1 else None
                event = {"choices": [{"token_ids": [token], "finish_reason": end}]}
                await response.write(f"data: {json.dumps(event)}\n\n".encode())
                await asyncio.sleep(0.01 if "prompt" in body else 0.0)
        except ConnectionError:
            self.num_left += 1
        return response


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
async def load(gateway: Gateway) -> AsyncIterator[SoakLoad]:
    app = web.Application()
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.router.add_post(path, gateway.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as http:
        client = StreamClient(http, url, "any", SystemClock())
        yield SoakLoad([client], REQUESTS, clients=4, seed=1, leave_within_s=(0.001, 0.03))
    await runner.cleanup()


async def run(load: SoakLoad, each_at_least: int) -> dict[RequestKind, LoadCount]:
    async with load.running():
        while min(count.sent for count in load.counts.values()) < each_at_least:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return load.counts


def test_there_are_as_many_requests_of_each_kind() -> None:
    kinds = [request.kind for request in REQUESTS]
    assert {kinds.count(kind) for kind in RequestKind} == {len(REQUESTS) // len(RequestKind)}


async def test_undisturbed_answers_are_as_expected(load: SoakLoad, gateway: Gateway) -> None:
    await load.learn()
    counts = await run(load, 3)
    assert all(count.wrong == count.lost == count.refused == 0 for count in counts.values())
    stay = [count for kind, count in counts.items() if kind is not RequestKind.LEFT]
    assert all(count.tokens > 0 for count in stay)
    salted = [salt for salt in gateway.salts if salt is not None]
    assert 0 < len(salted) < len(gateway.salts)
    assert len(set(salted)) == len(salted)


async def test_a_wrong_token_and_a_refusal_are_counted(load: SoakLoad, gateway: Gateway) -> None:
    await load.learn()
    gateway.is_broken = True
    counts = await run(load, 2)
    guided, long, chat = (
        counts[kind] for kind in (RequestKind.GUIDED, RequestKind.LONG, RequestKind.CHAT)
    )
    assert guided.damage == Damage(changed=guided.sent)
    assert long.refused == long.sent
    assert long.wrong == 0  # nothing came that could be wrong
    assert long.errors == {'HTTP 503: {"error": {}}'}
    assert chat.wrong == chat.refused == 0


async def test_an_undisturbed_request_must_not_fail(load: SoakLoad, gateway: Gateway) -> None:
    gateway.is_broken = True
    with pytest.raises(Unavailable, match="long prompt failed: HTTP 503"):
        await load.learn()


async def test_clients_that_leave_lose_nothing_that_they_had(load: SoakLoad) -> None:
    await load.learn()
    left = (await run(load, 12))[RequestKind.LEFT]
    assert 0 < left.left <= left.sent
    assert left.tokens < left.sent * NEW_TOKENS
    assert left.wrong == left.lost == 0
