"""The hostile one of two clients: what `benchmarks.hostile` measures the other one under. A process
of its own, so that the work of attacking does not delay the measuring client.

It reads names of attacks from standard input, a line each: a name begins that attack, an empty line
ends it, and each line is answered by one: what the attack's requests were answered so far. "spend
0.8" asks nobody for anything, and computes on 0.8 of a core."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

BODY_BYTES = (4 << 20) - 64
_CONTEXT_TOKENS = 2000


class Attacker:
    """One client with one API key. `answers` counts statuses, and what ended otherwise."""

    def __init__(self, http: aiohttp.ClientSession, url: str, model: str) -> None:
        self._http, self._url, self._model = http, url, model
        self._rng = random.Random(7)
        self.answers: Counter[str] = Counter()

    async def post(self, path: str, body: bytes, **headers: str) -> None:
        try:
            async with self._http.post(self._url + path, data=body, headers=headers) as response:
                async for _ in response.content.iter_any():
                    pass
                self.answers[str(response.status)] += 1
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            self.answers[type(error).__name__] += 1
            await asyncio.sleep(0.01)

    async def complete(self, **fields: Any) -> None:
        body = {"model": self._model, "max_tokens": 200, "ignore_eos": True, **fields}
        await self.post("/v1/completions", json.dumps(body).encode())

    async def chat(self, **fields: Any) -> None:
        message = [{"role": "user", "content": "x"}]
        body = {"model": self._model, "max_tokens": 4, "messages": message, **fields}
        await self.post("/v1/chat/completions", json.dumps(body).encode())

    def prompt(self, length: int) -> list[int]:
        """A new one: nothing of it is cached."""
        return [self._rng.randrange(300, 4000) for _ in range(length)]

    async def choices(self) -> None:
        await self.complete(prompt=self.prompt(8), n=128, stream=True)

    async def sampling(self) -> None:
        """What the host computes for each token: as much as a request may ask for."""
        await self.complete(
            prompt=self.prompt(8),
            n=64,
            stream=True,
            temperature=1.0,
            min_p=0.01,
            top_p=0.9,
            repetition_penalty=1.1,
            logit_bias={str(token): 0.5 for token in range(300, 1324)},
            bad_words=[f"{number} and {number}" for number in range(128)],
        )

    async def long_prompts(self) -> None:
        await self.complete(prompt=self.prompt(_CONTEXT_TOKENS), max_tokens=1)

    async def prompt_logprobs(self) -> None:
        scored = {"prompt_logprobs": 20, "logprobs": 5, "n": 4, "max_tokens": 8}
        await self.complete(prompt=self.prompt(_CONTEXT_TOKENS), **scored)

    async def grammars(self) -> None:
        """A schema of 59 KB that nobody has sent before, and one of 8,000 properties."""
        for num_properties in (1900, 8000):
            salt = self._rng.randrange(1 << 30)
            properties = {f"p{salt}_{i}": {"type": "string"} for i in range(num_properties)}
            schema = {"type": "object", "properties": properties, "required": list(properties)}
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            await self.chat(response_format=form, n=4)

    async def templates(self) -> None:
        """As many messages as a body may have, and more."""
        for body in CHATS:
            await self.post("/v1/chat/completions", body)

    async def junk(self) -> None:
        for body in JUNK:
            await self.post("/v1/completions", body, **{"Content-Type": "application/json"})

    async def junk_elsewhere(self) -> None:
        """To what reads no body, to no route at all, and without a right key."""
        for path in ("/health", "/v1/models", "/nothing"):
            await self.post(path, JUNK[0])
        await self.post("/v1/completions", JUNK[0], Authorization="Bearer wrong")

    async def coded(self) -> None:
        """Bodies that grow: to nothing but zeros, and to as much as a body may have."""
        for body in CODED:
            await self.post("/v1/completions", body, **{"Content-Encoding": "gzip"})

    async def small_chunks(self) -> None:
        """A body in chunks of one byte."""
        host, port = self._url.removeprefix("http://").split(":")
        key = self._http.headers.get("Authorization", "")
        header = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(header.encode() + SMALL_CHUNKS)
                self.answers[(await reader.readline()).decode()[9:12]] += 1
            finally:
                writer.transport.abort()
        except OSError as error:
            self.answers[type(error).__name__] += 1

    async def metrics(self) -> None:
        async with self._http.get(self._url + "/metrics") as response:
            await response.read()
            self.answers[str(response.status)] += 1

    async def small_requests(self) -> None:
        await self.complete(prompt=[5], max_tokens=1)

    async def refused_requests(self) -> None:
        await self.post("/v1/completions", b"{")

    async def half_headers(self) -> None:
        host, port = self._url.removeprefix("http://").split(":")
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            self.answers["refused"] += 1
            return
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
            await asyncio.sleep(self._rng.uniform(0.1, 2.0))
        finally:
            writer.transport.abort()
        self.answers["half"] += 1


def _junk() -> list[bytes]:
    def filled(begin: str, unit: str, end: str) -> bytes:
        room = BODY_BYTES - len(begin) - len(end)
        return (begin + unit * (room // len(unit)) + end).encode()

    return [
        b"\xff" * BODY_BYTES,
        filled('{"prompt": "', "a", '"}'),
        filled('{"prompt": "', "\\u0001", '"}'),
        filled('{"prompt": [', "1,", "1]}"),
        filled('{"prompt": "x", "y": [', '"",', '""]}'),
        filled('{"prompt": "x", "y": [', "[],", "[]]}"),
        filled('{"prompt": "x", "y": ', "[", ""),
        filled('{"prompt": "', '\\"', '"}'),
    ]


JUNK = _junk()
CHATS = [
    json.dumps({"max_tokens": 4, "messages": [{"role": "user", "content": ""}] * number}).encode()
    for number in (4_000, 100_000)
]
SMALL_CHUNKS = b"1\r\n \r\n" * 300_000 + b"0\r\n\r\n"
CODED = [gzip.compress(bytes(64 << 20)), *(gzip.compress(body) for body in JUNK[1:4])]

ATTACKS: dict[str, list[tuple[Callable[[Attacker], Awaitable[None]], int]]] = {
    "choices": [(Attacker.choices, 16)],
    "sampling": [(Attacker.sampling, 16)],
    "long prompts": [(Attacker.long_prompts, 16)],
    "prompt log-probabilities": [(Attacker.prompt_logprobs, 8)],
    "grammars": [(Attacker.grammars, 8)],
    "templates": [(Attacker.templates, 8)],
    "4 MB bodies": [(Attacker.junk, 8)],
    "4 MB bodies elsewhere": [(Attacker.junk_elsewhere, 8)],
    "small chunks": [(Attacker.small_chunks, 8)],
    "metrics": [(Attacker.metrics, 16)],
    "coded bodies": [(Attacker.coded, 8)],
    "small requests": [(Attacker.small_requests, 64)],
    "refused requests": [(Attacker.refused_requests, 64)],
    "half headers": [(Attacker.half_headers, 256)],
}
"""By name: what is done, and by how many tasks at once, again and again."""
EVERYTHING = "everything"
SPEND = "spend"
_SPENT_AT_ONCE_S = 0.5e-3


def tasks_of(name: str) -> list[tuple[Callable[[Attacker], Awaitable[None]], int]]:
    if name == EVERYTHING:
        return [each for attack in ATTACKS.values() for each in attack]
    return ATTACKS[name]


class Spending:
    """A thread that computes on a share of a core, as far as it gets one, until `end`."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._ends.is_set():
            until = time.thread_time() + _SPENT_AT_ONCE_S
            while time.thread_time() < until:
                pass
            owed_s = (time.monotonic() - began) * self._share - time.thread_time()
            if owed_s < 0:
                time.sleep(-owed_s / self._share)


async def repeat(attacker: Attacker, attack: Callable[[Attacker], Awaitable[None]]) -> None:
    while True:
        await attack(attacker)


async def serve(url: str, model: str, key: str) -> None:
    os.nice(10)  # a real one has a machine of its own
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers, connector=connector) as http:
        attacker = Attacker(http, url, model)
        running: list[asyncio.Task[None]] = []
        spending: Spending | None = None
        while line := await reader.readline():
            name, _, share = line.decode().strip().partition(f"{SPEND} ")
            if spending is not None:
                spending.end()
            spending = Spending(float(share)) if share else None
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            running = [
                asyncio.create_task(repeat(attacker, attack))
                for attack, number in (tasks_of(name) if name else [])
                for _ in range(number)
            ]
            print(json.dumps(dict(attacker.answers)), flush=True)
            attacker.answers.clear()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2], os.environ.get("STARFISH_API_KEY", "")))
