"""Changes on purpose as people ask for them, by commands, while an answer streams: each command
waits until its change is done, also if the control plane that leads is killed in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cli.admin.follow import EXIT_FAILED, EXIT_REFUSED
from cli.run_dir import read_state
from tests.support.cluster import Cluster, running_cluster

pytestmark = pytest.mark.timeout(300)
WAIT_S = 120.0
PROMPT = [5, 6, 7, 8]
NUM_TOKENS = 400


class Command:
    """A running `starfish` command about the cluster."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ends(self, code: int = 0) -> dict[str, Any]:
        """Its JSON."""
        async with asyncio.timeout(WAIT_S):
            out, err = await self._process.communicate()
        assert self._process.returncode == code, (out, err)
        answer: dict[str, Any] = json.loads(out)
        return answer

    async def waits_for(self) -> str:
        """The first thing that it waits for."""
        assert self._process.stderr is not None
        async with asyncio.timeout(WAIT_S):
            return (await self._process.stderr.readline()).decode()

    async def is_interrupted(self) -> tuple[int | None, str]:
        """Its exit code, and what it says then."""
        self._process.send_signal(signal.SIGINT)
        async with asyncio.timeout(WAIT_S):
            _, err = await self._process.communicate()
        return self._process.returncode, " ".join(err.decode().split())


async def begin(cluster: Cluster, *arguments: str) -> Command:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli", *arguments),
        *("--run-dir", str(cluster.run_dir), "--json"),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    return Command(process)


async def asked(cluster: Cluster, *arguments: str, code: int = 0) -> dict[str, Any]:
    return await (await begin(cluster, *arguments)).ends(code)


def ranks_of(answer: dict[str, Any]) -> dict[int, str]:
    """State by rank."""
    return {rank["rank"]: rank["state"] for rank in answer["status"]["ranks"]}


@asynccontextmanager
async def admin_api(cluster: Cluster) -> AsyncIterator[aiohttp.ClientSession]:
    """For what must not take as long as a command takes to start. Paths are below `/v1/`."""
    state = read_state(cluster.run_dir)
    assert state is not None
    headers = {"Authorization": f"Bearer {Path(state.admin_token_file).read_text().strip()}"}
    async with (
        asyncio.timeout(WAIT_S),
        aiohttp.ClientSession(f"{state.admin_url}/v1/", headers=headers) as http,
    ):
        yield http


async def until(cluster: Cluster, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status of the admin API that is so."""
    async with admin_api(cluster) as http:
        while True:
            async with http.get("status") as response:
                status: dict[str, Any] = await response.json()
                if wanted(status):
                    return status
            await asyncio.sleep(0.05)


def num_live(status: dict[str, Any]) -> int:
    return sum(rank["state"] == "live" for rank in status["ranks"])


async def test_drain_undrain_and_scale_while_an_answer_streams(
    tmp_path: Path, small_model: Path
) -> None:
    flags = ("--slots-per-rank", "5", "--redundant-experts", "4")
    async with running_cluster(tmp_path / "run", small_model, ranks=3, flags=flags) as cluster:
        expected = await cluster.stream(PROMPT, max_tokens=NUM_TOKENS)
        streaming = asyncio.create_task(repeated(cluster))

        # The leader is killed once the drain is asked for: the command asks on, another carries on.
        leader = (await cluster.status())["leader"]
        draining = await begin(cluster, "drain", "1", "--grace", "2")
        await until(cluster, lambda status: status["change"]["number"] == 1)
        os.kill(leader["pid"], signal.SIGKILL)
        answer = await draining.ends()
        assert answer["done"]
        assert ranks_of(answer) == {0: "live", 1: "drained", 2: "live"}

        status = await cluster.status()
        rank = status["ranks"][1]
        assert (rank["state"], rank["safe_to_terminate"]) == ("drained", True)
        assert not status["change"]["in_progress"]
        assert status["leader"]["term"] > leader["term"]

        refused = await asked(cluster, "drain", "0", "--grace", "0", code=EXIT_REFUSED)
        assert "1 more rank of 5 slots must serve" in refused["refused"]

        assert ranks_of(await asked(cluster, "undrain", "1"))[1] == "live"

        # An interrupt ends the command, not the change.
        growing = await begin(cluster, "scale", "4")
        assert (await growing.waits_for()).startswith("rank 3 has not registered yet")
        code, said = await growing.is_interrupted()
        assert (code, "the change goes on" in said) == (130, True)
        await until(cluster, lambda status: num_live(status) == 4)

        # Who asked first is told when somebody else wants something different meanwhile.
        growing = await begin(cluster, "scale", "5")
        assert (await growing.waits_for()).startswith("rank 4 has not registered yet")
        fewer = {"ranks": 4, "grace_s": 0, "request_id": "fewer"}
        async with admin_api(cluster) as http, http.post("scale", json=fewer) as response:
            assert response.status == 202, await response.text()
        answer = await growing.ends(EXIT_FAILED)
        assert not answer["done"]
        assert answer["result"] == (
            "not scaled to 5 ranks: 4 shall exist (somebody has changed the plan meanwhile)"
        )
        await until(cluster, lambda status: not status["change"]["in_progress"])

        answer = await asked(cluster, "scale", "--remove", "0", "--grace", "2")
        assert ranks_of(answer) == {1: "live", 2: "live", 3: "live"}

        streaming.cancel()
        results = await streaming
        assert len(results) >= 1
        assert {result.token_ids for result in results} == {expected.token_ids}
        assert {(result.finish_reason, result.error) for result in results} == {("length", None)}


async def repeated(cluster: Cluster) -> list[Any]:
    """One stream after the other until cancelled; the last one is whole as well."""
    results, stop = [], False
    while not stop:
        stream = asyncio.create_task(cluster.stream(PROMPT, max_tokens=NUM_TOKENS))
        try:
            results.append(await asyncio.shield(stream))
        except asyncio.CancelledError:
            results.append(await stream)
            stop = True
    return results
