"""What `benchmarks.routers` puts behind a router or a gateway: processes that cost nearly nothing,
so that what is in front of them is measured. A backend of HTTP for routers, a rank for the
gateway; both give every stream one token a step."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
from typing import Any

import uvloop
from aiohttp import web

from shared.handshake import Access
from tests.support.gateway_harness import MODEL
from tests.support.toy_rank import ToyRank


class Steps:
    """All streams of a backend go on together, as those of a batch do."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next = asyncio.Event()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            before, self._next = self._next, asyncio.Event()
            before.set()

    async def wait(self) -> None:
        await self._next.wait()


class Backend:
    """OpenAI's completions and chats, and what routers ask a worker for."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._numbers = itertools.count()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_get("/v1/models", self._models)
        for path in ("/health", "/health_generate"):
            app.router.add_get(path, self._healthy)
        for path in ("/get_server_info", "/server_info", "/get_model_info", "/model_info"):
            app.router.add_get(path, self._info)
        return app

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _info(self, _: web.Request) -> web.Response:
        info = {"model_id": MODEL, "served_model_name": MODEL, "model_path": MODEL}
        return web.json_response(info | {"is_generation": True, "tp_size": 1, "dp_size": 1})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        count = int(body["max_tokens"])
        if not body.get("stream"):
            for _ in range(count):
                await self._steps.wait()
            return web.json_response(self._event("a" * count, [7] * count, "length"))
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "x-starfish-rank": str(os.getpid())}
        )
        await response.prepare(request)
        for number in range(1, count + 1):
            await self._steps.wait()
            event = self._event("a", [7], "length" if number == count else None)
            await response.write(b"data: %b\n\n" % json.dumps(event).encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    def _event(self, text: str, ids: list[int], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": finish}
        return {
            "id": f"cmpl-{next(self._numbers)}",
            "object": "text_completion",
            "created": 1,
            "model": MODEL,
            "choices": [choice | {"logprobs": None}],
            "usage": {"prompt_tokens": 8, "completion_tokens": len(ids), "total_tokens": 8},
        }


async def serve_http(port: int, step_s: float) -> None:
    steps = Steps(step_s)
    runner = web.AppRunner(Backend(steps).app(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await steps.run()


async def serve_rank(port: int, step_s: float, number: int, instance: str) -> None:
    rank = ToyRank(number, step_s=step_s)
    rank.access = Access(instance)
    await rank.start(port)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, required=True)
    parser.add_argument("--rank", type=int, default=-1, help="be this rank of --instance")
    parser.add_argument("--instance", default="")
    options = parser.parse_args()
    step_s = options.step_ms / 1e3
    if options.rank < 0:
        uvloop.run(serve_http(options.port, step_s))
    else:
        uvloop.run(serve_rank(options.port, step_s, options.rank, options.instance))


if __name__ == "__main__":
    main()
