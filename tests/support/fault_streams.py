"""The same request streamed with several seeds at once, undisturbed or with a rank killed in the
middle of one of the streams."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import aiohttp

from tests.support.authentication import client_session
from tests.support.cluster import Cluster


class Answer(Protocol):
    """What one client is told, as its test compares it."""

    def take(self, event: dict[str, Any]) -> None:
        """The next event, which tells of no error."""
        ...


AnswerT = TypeVar("AnswerT", bound=Answer)


async def run_streams(
    cluster: Cluster,
    path: str,
    body: dict[str, Any],
    make_answer: Callable[[], AnswerT],
    seeds: Iterable[int],
    on_event: Callable[[AnswerT, int], None] = lambda answer, rank: None,
) -> list[AnswerT]:
    """One answer a seed. `on_event` is called after each event, with the rank that the stream
    began on."""
    model = await cluster.model_name()

    async def one(http: aiohttp.ClientSession, seed: int) -> AnswerT:
        answer = make_answer()
        whole = {"model": model, **body, "stream": True, "seed": seed}
        async with http.post(cluster.url + path, json=whole) as response:
            assert response.status == 200, await response.text()
            rank = int(response.headers["x-starfish-rank"])
            async for line in response.content:
                name, _, data = line.decode().strip().partition(": ")
                if name == "data" and data != "[DONE]":
                    event = json.loads(data)
                    assert not event.get("error"), event
                    answer.take(event)
                    on_event(answer, rank)
        return answer

    async with (
        client_session(timeout=aiohttp.ClientTimeout(total=120)) as http,
        asyncio.TaskGroup() as tasks,
    ):
        streams = [tasks.create_task(one(http, seed)) for seed in seeds]
    return [stream.result() for stream in streams]


async def run_streams_with_kill(
    cluster: Cluster,
    path: str,
    body: dict[str, Any],
    make_answer: Callable[[], AnswerT],
    seeds: Iterable[int],
    *,
    num_ranks: int,
    is_in_the_middle: Callable[[AnswerT], bool],
) -> list[AnswerT]:
    """Waits until so many ranks live; kills that of the first stream in the middle, there."""
    pids = await cluster.wait_live(num_ranks)
    killed: list[int] = []

    def on_event(answer: AnswerT, rank: int) -> None:
        if not killed and is_in_the_middle(answer):
            killed.append(rank)
            os.kill(pids[rank], signal.SIGKILL)

    answers = await run_streams(cluster, path, body, make_answer, seeds, on_event)
    assert killed, "no stream was in the middle"
    return answers
