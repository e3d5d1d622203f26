"""A whole instance for a test: `starfish up` as a user runs it, in a process of its own, and the
few things a test does to it: send streams, read the status, kill a rank."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from cli.observe.status import read_status
from cli.run_dir import read_state
from shared.clock import SystemClock
from shared.free_ports import free_ports
from tests.support.authentication import client_session

UP_TIMEOUT_S = 150.0
DOWN_TIMEOUT_S = 90.0


def free_port() -> int:
    return free_ports(1)[0]


def ports_in_a_row(number: int) -> int:
    """The first of so many, on which nobody listens now."""
    while True:
        (first,) = free_ports(1)
        with contextlib.ExitStack() as probes:
            try:
                for port in range(first, first + number):
                    probes.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first


@dataclass(frozen=True, slots=True)
class StreamResult:
    """What one client saw."""

    token_ids: tuple[int, ...]
    finish_reason: str | None
    error: str | None


class AtTotal:
    """An event that fires when all streams together have received `total` tokens."""

    def __init__(self, total: int) -> None:
        self._left = total
        self.reached = asyncio.Event()

    def __call__(self, count: int) -> None:
        self._left -= 1
        if self._left <= 0:
            self.reached.set()


class Cluster:
    """Handle on a running instance."""

    def __init__(self, run_dir: Path, port: int, http: aiohttp.ClientSession) -> None:
        self.run_dir = run_dir
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._http = http

    async def status(self) -> dict[str, Any]:
        """As `starfish status --json` has it. Not by that command: tests ask again and again until
        something is so, and each start of a process takes the instance's time away."""
        state = read_state(self.run_dir)
        assert state is not None, "it has not started, or has ended"
        status: dict[str, Any] = await read_status(state.target(), SystemClock())
        return status

    async def live_ranks(self) -> dict[int, int]:
        """pid by rank, of the ranks in the map."""
        ranks = (await self.status())["ranks"]
        return {r["rank"]: r["pid"] for r in ranks if r["state"] == "live"}

    async def wait_live(self, num_ranks: int, timeout_s: float = 60.0) -> dict[int, int]:
        """Until that many ranks are in the map; pid by rank."""
        async with asyncio.timeout(timeout_s):
            while True:
                live = await self.live_ranks()
                if len(live) == num_ranks:
                    return live
                await asyncio.sleep(0.2)

    async def stream(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        on_token: Callable[[int], None] = lambda index: None,
        **sampling: Any,
    ) -> StreamResult:
        """One streamed completion by token ids; `on_token` is called with the count so far."""
        body = {
            "model": "any",
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "stream": True,
            "return_token_ids": True,
            "temperature": 0,
            "ignore_eos": True,
            **sampling,
        }
        body["model"] = await self.model_name()
        ids: list[int] = []
        finish: str | None = None
        async with self._http.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status != 200:
                return StreamResult((), None, await response.text())
            async for line in response.content:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return StreamResult(tuple(ids), finish, str(event["error"]))
                for choice in event["choices"]:
                    for token in choice.get("token_ids") or []:  # a fast model's come together
                        ids.append(token)
                        on_token(len(ids))
                    finish = choice["finish_reason"] or finish
        return StreamResult(tuple(ids), finish, None)

    async def get(self, url: str) -> str:
        """Raises OSError if nobody answers."""
        async with self._http.get(url) as response:
            return await response.text()

    async def model_name(self) -> str:
        async with self._http.get(f"{self.url}/v1/models") as response:
            name: str = (await response.json())["data"][0]["id"]
            return name


async def stream_events(
    http: aiohttp.ClientSession, cluster: Cluster, body: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """The events of one streamed completion, [DONE] left out."""
    body = {"model": await cluster.model_name(), "stream": True, **body}
    async with http.post(f"{cluster.url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


@asynccontextmanager
async def running_cluster(
    run_dir: Path, model: Path, *, ranks: int = 4, flags: Sequence[str] = (), api_key: str = ""
) -> AsyncIterator[Cluster]:
    """Starts `starfish up`, waits until it serves, stops it by SIGINT unless it has ended, and
    checks that it ended well. Its output is in `run_dir/up.log`. The cluster's requests are made
    with `api_key`."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    port = free_port()
    with (run_dir / "up.log").open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli", "up", "--no-demo", "--model", str(model)),
            *("--ranks", str(ranks), "--port", str(port), "--run-dir", str(run_dir)),
            *("--instance", f"test-{port}-{os.getpid()}", *flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        timeout = aiohttp.ClientTimeout(total=120)
        headers = {"x-api-key": api_key} if api_key else {}
        async with client_session(timeout=timeout, headers=headers) as http:
            cluster = Cluster(run_dir, port, http)
            await _wait_ready(cluster, process, http)
            yield cluster
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        async with asyncio.timeout(DOWN_TIMEOUT_S):
            assert await process.wait() == 0, (run_dir / "up.log").read_text()[-4000:]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _wait_ready(
    cluster: Cluster, process: asyncio.subprocess.Process, http: aiohttp.ClientSession
) -> None:
    async with asyncio.timeout(UP_TIMEOUT_S):
        while True:
            if process.returncode is not None:
                raise AssertionError((cluster.run_dir / "up.log").read_text()[-4000:])
            try:
                async with http.get(f"{cluster.url}/health") as response:
                    if response.status == 200 and read_state(cluster.run_dir) is not None:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
