"""One client's streamed completion, with the arrival time of every chunk."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from cli.client_headers import VARIABLE, client_headers
from shared.clock import Clock
from shared.errors import Unavailable
from shared.garbage_collector import freeze_loaded_objects

RANK_HEADER = "x-starfish-rank"
LAST_EVENT_ID = "Last-Event-ID"
_RESUMES_MAX = 50
_RESUME_AFTER_S = 0.02


@dataclass(slots=True, kw_only=True)
class StreamRecord:
    """`arrivals` has one entry per chunk with tokens. Times are `Clock.now()`."""

    sent_at: float
    rank: int | None = None  # the first rank, if the gateway reports it
    accepted: bool = False  # the gateway has begun an answer
    event_id: str = ""  # of the last event, if the gateway gives them ids
    next_event_id: str = ""  # of the one that is being read
    is_broken: bool = False  # the connection has ended before the stream had
    resumed: int = 0  # how often it went on at a gateway after its connection had broken
    ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None

    @property
    def ttft_ms(self) -> float:
        return (self.arrivals[0] - self.sent_at) * 1000

    def gaps_ms(self, since: float = 0.0) -> list[float]:
        """Gaps between consecutive chunks, if the later chunk came after `since`."""
        pairs = itertools.pairwise(self.arrivals)
        return [(later - earlier) * 1000 for earlier, later in pairs if later > since]

    def first_after(self, moment: float) -> float | None:
        return next((at for at in self.arrivals if at > moment), None)


class StreamClient:
    """Requests greedy completions as token ids, so that runs can be compared token by token."""

    def __init__(self, http: aiohttp.ClientSession, url: str, model: str, clock: Clock) -> None:
        self._http, self._url, self._model, self._clock = http, url, model, clock

    async def run(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        on_chunk: Callable[[int], None] = lambda num_tokens: None,
        on_start: Callable[[StreamRecord], None] = lambda record: None,
        *,
        bypass_cache: bool = False,
        fields: Mapping[str, object] | None = None,
        resumes: bool = False,
    ) -> StreamRecord:
        """A failure of the server goes into the record and is never raised. The record grows while
        the stream runs. `bypass_cache`: ranks do not use their prefix caches. `fields` are added to
        the request's, or replace them. `resumes`: a stream whose connection breaks is resumed."""
        body = self._body(prompt, max_tokens, bypass_cache) | dict(fields or {})
        return await self.post("/v1/completions", body, on_chunk, on_start, resumes=resumes)

    async def post(
        self,
        path: str,
        fields: Mapping[str, object],
        on_chunk: Callable[[int], None] = lambda num_tokens: None,
        on_start: Callable[[StreamRecord], None] = lambda record: None,
        *,
        resumes: bool = False,
    ) -> StreamRecord:
        """As `run`, with a body of one's own; the model and what makes it a stream of token ids are
        added."""
        record = StreamRecord(sent_at=self._clock.now())
        on_start(record)
        body = {**fields, "model": self._model, "stream": True, "return_token_ids": True}
        await self._read_stream(path, body, record, on_chunk)
        while resumes and record.is_broken and record.event_id and record.resumed < _RESUMES_MAX:
            record.error, record.resumed = None, record.resumed + 1
            await asyncio.sleep(_RESUME_AFTER_S)
            await self._read_stream(path, body, record, on_chunk)
        return record

    async def _read_stream(
        self,
        path: str,
        body: Mapping[str, object],
        record: StreamRecord,
        on_chunk: Callable[[int], None],
    ) -> None:
        """One connection. What it was given before, it does not get again."""
        headers = {LAST_EVENT_ID: record.event_id} if record.event_id else {}
        record.is_broken = False
        try:
            async with self._http.post(
                f"{self._url}{path}", json=body, headers=headers
            ) as response:
                if response.status != 200:
                    record.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                    return
                record.accepted = True
                rank = response.headers.get(RANK_HEADER)
                record.rank = int(rank) if rank is not None and rank.isdigit() else None
                async for line in response.content:
                    self._parse_line(line, record, on_chunk)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            record.error = f"{type(error).__name__}: {error}"
            record.is_broken = isinstance(error, aiohttp.ClientError)
        if record.error is None and record.finish is None:
            record.error, record.is_broken = "the stream ended early", True

    def _parse_line(
        self, line: bytes, record: StreamRecord, on_chunk: Callable[[int], None]
    ) -> None:
        if line.startswith(b"id: "):
            record.next_event_id = line[4:].decode().strip()
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            return
        now = self._clock.now()
        event = json.loads(line[6:])
        record.event_id = record.next_event_id  # only now has it been read to its end
        if "error" in event:
            record.error = str(event["error"].get("message"))
            return
        for choice in event["choices"]:
            ids = choice.get("token_ids") or []
            if ids:
                record.ids += ids
                record.arrivals.append(now)
                on_chunk(len(ids))
            record.finish = choice.get("finish_reason") or record.finish

    def _body(
        self, prompt: Sequence[int], max_tokens: int, bypass_cache: bool
    ) -> dict[str, object]:
        # Cached blocks have no log-probabilities, so asking for these bypasses the cache.
        scores = {"echo": True, "logprobs": 0} if bypass_cache else {}
        return {
            **scores,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }


@asynccontextmanager
async def stream_client(url: str, clock: Clock) -> AsyncIterator[StreamClient]:
    """Raises Unavailable if no gateway answers. From now on the garbage collector ignores all
    objects that exist: a collection would look like a pause of the server."""
    freeze_loaded_objects()
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    headers = client_headers(os.environ)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as http:
        yield StreamClient(http, url, await served_name(http, url), clock)


async def served_name(http: aiohttp.ClientSession, url: str) -> str:
    """Name of the model that the gateway serves. Raises Unavailable if no gateway answers."""
    try:
        async with http.get(f"{url}/v1/models") as response:
            if response.status == 401:
                raise Unavailable(f"{url} asks for an API key: pass a right one in {VARIABLE}")
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, LookupError, ValueError) as error:
        detail = str(error) or type(error).__name__
        raise Unavailable(f"no gateway answers at {url}: {detail}; check --url") from error


def random_prompts(seed: int, count: int, num_tokens: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300, 4000) for _ in range(num_tokens)] for _ in range(count)]


async def run_all(
    client: StreamClient,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    on_chunk: Callable[[int], None] = lambda num_tokens: None,
    *,
    bypass_cache: bool = False,
) -> list[StreamRecord]:
    """Runs all prompts at once."""
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(client.run(p, max_tokens, on_chunk, bypass_cache=bypass_cache))
            for p in prompts
        ]
    return [task.result() for task in running]
