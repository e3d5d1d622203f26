"""Scores documents through a gateway: the log-probability of each token, given those before it."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from cli.bench.stream_client import served_name
from cli.client_headers import client_headers
from cli.evaluate.documents import Document
from shared.errors import Unavailable

_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """`nats` has one entry per document: the exact sum of its negative log-probabilities."""

    nats: tuple[float, ...]
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return math.fsum(self.nats) / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(math.fsum(self.nats) / self.num_tokens)


def score_of(nats: Sequence[float], documents: Sequence[Document]) -> Score:
    return Score(
        nats=tuple(nats),
        num_tokens=sum(len(d.tokens) - 1 for d in documents),
        num_bytes=sum(d.num_bytes for d in documents),
    )


class Scorer:
    """Scores with one model of one gateway."""

    def __init__(self, http: aiohttp.ClientSession, url: str, model: str) -> None:
        self._http, self._url, self._model = http, url, model

    async def score(
        self,
        documents: Sequence[Document],
        *,
        concurrency: int,
        on_progress: Callable[[int], None],
    ) -> Score:
        """Scores `concurrency` documents at once. `on_progress` gets the number that are done.
        Raises Unavailable if the server cannot score a document."""
        nats = [0.0] * len(documents)
        waiting = list(enumerate(documents))[::-1]
        done = 0

        async def work() -> None:
            nonlocal done
            while waiting:
                index, document = waiting.pop()
                nats[index] = await self._nats(document)
                done += 1
                on_progress(done)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(work())
        return score_of(nats, documents)

    async def _nats(self, document: Document) -> float:
        body = {
            "model": self._model,
            "prompt": list(document.tokens),
            "max_tokens": 0,
            "prompt_logprobs": 0,
        }
        try:
            async with self._http.post(f"{self._url}/v1/completions", json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    message = answer.get("error", {}).get("message", "no reason given")
                    raise Unavailable(f"the server cannot score: {message}")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            detail = str(error) or type(error).__name__
            raise Unavailable(f"the gateway at {self._url} failed: {detail}") from error
        return -math.fsum(_logprobs(answer, document))


def _logprobs(answer: dict[str, Any], document: Document) -> list[float]:
    try:
        rows = answer["choices"][0]["prompt_logprobs"][1:]
        scored = zip(rows, document.tokens[1:], strict=True)
        return [float(row[str(token)]["logprob"]) for row, token in scored]
    except (LookupError, TypeError, ValueError) as error:
        raise Unavailable(f"the answer lacks a token's log-probability: {error!r}") from error


@asynccontextmanager
async def open_scorer(url: str) -> AsyncIterator[Scorer]:
    """Raises Unavailable if no gateway answers."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(
        timeout=timeout,
        connector=aiohttp.TCPConnector(limit=0),
        headers=client_headers(os.environ),
    ) as http:
        yield Scorer(http, url, await served_name(http, url))
