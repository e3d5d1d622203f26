"""A gateway that is told to end while others could serve: no new connection is refused, and its
streams finish."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from cli.run_dir import read_state
from tests.support.authentication import client_session
from tests.support.cluster import Cluster, running_cluster

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]
LONG = {"prompt": [3, 4, 5], "max_tokens": 200, "ignore_eos": True, "stream": True}
END = "data: [DONE]\n\n"
SHORT = {"prompt": [7, 8], "max_tokens": 2, "ignore_eos": True}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(
    small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    run_dir = tmp_path_factory.mktemp("drained") / "run"
    flags = ("--gateways", "2")
    async with running_cluster(run_dir, small_model, ranks=2, flags=flags) as running:
        yield running


async def stream(cluster: Cluster, model: str, begun: asyncio.Event) -> str:
    """The text of a whole answer, with the errors in it."""
    async with client_session() as http:
        url = cluster.url + "/v1/completions"
        async with http.post(url, json={**LONG, "model": model}) as response:
            assert response.status == 200, await response.text()
            text = ""
            async for line in response.content:
                begun.set()
                text += line.decode()
            return text


async def ask_anew(cluster: Cluster, model: str, answers: list[Any], stop: asyncio.Event) -> None:
    """Each request on a connection of its own, until `stop`."""
    while not stop.is_set():
        async with client_session() as http:
            url = cluster.url + "/v1/completions"
            try:
                async with http.post(url, json={**SHORT, "model": model}) as response:
                    await response.read()
                    answers.append(response.status)
            except aiohttp.ClientError as error:
                answers.append(repr(error))


@pytest.mark.parametrize("num_ended", [1, 2])
async def test_sigterm_of_gateways_refuses_no_new_connection(
    cluster: Cluster, num_ended: int
) -> None:
    """Of two the second one's successor takes a whole start: connections wait for it."""
    model = await cluster.model_name()
    gateways = [gateway["pid"] for gateway in (await cluster.status())["gateways"]]
    begun = [asyncio.Event() for _ in range(8)]
    streams = [asyncio.ensure_future(stream(cluster, model, each)) for each in begun]
    for each in begun:
        await each.wait()
    answers: list[Any] = []
    stop = asyncio.Event()
    asking = [asyncio.ensure_future(ask_anew(cluster, model, answers, stop)) for _ in range(6)]
    ended = gateways[:num_ended]
    for pid in ended:
        os.kill(pid, signal.SIGTERM)
    texts = await asyncio.gather(*streams)
    async with asyncio.timeout(60):
        while any(Path(f"/proc/{pid}").exists() for pid in ended):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        seen = len(answers)
        while len(answers) < seen + 50:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*asking)
    assert set(answers) == {200}
    broken = [text[-400:] for text in texts if '"error":' in text or not text.endswith(END)]
    assert broken == []
    async with asyncio.timeout(60):
        while True:
            now = {gateway["pid"] for gateway in (await cluster.status())["gateways"]}
            if len(now) == 2 and not now & set(ended):
                return
            await asyncio.sleep(0.2)


async def test_all_gateways_of_an_instance_that_ends_answer_503_while_streams_finish(
    cluster: Cluster,
) -> None:
    """The last test: it ends the instance. A new connection is refused only once nobody streams."""
    model = await cluster.model_name()
    async with asyncio.timeout(60):
        while (state := read_state(cluster.run_dir)) is None:  # noqa: ASYNC110 - it is soon there
            await asyncio.sleep(0.05)
    begun = [asyncio.Event() for _ in range(8)]
    streams = [asyncio.ensure_future(stream(cluster, model, each)) for each in begun]
    for each in begun:
        await each.wait()
    os.kill(state.pid, signal.SIGTERM)
    answers: list[int] = []
    refusals: list[tuple[str, int]] = []
    async with asyncio.timeout(60):
        while not all(each.done() for each in streams):
            async with client_session() as http:
                url = cluster.url + "/v1/completions"
                try:
                    async with http.post(url, json={**SHORT, "model": model}) as response:
                        answers.append(response.status)
                        if response.status == 503:
                            headers = response.headers
                            refusals.append((headers["Connection"], int(headers["Retry-After"])))
                except aiohttp.ClientConnectorError as error:
                    await asyncio.sleep(0.2)
                    if error.errno == errno.ECONNREFUSED and not all(s.done() for s in streams):
                        answers.append(0)
                except aiohttp.ClientError:
                    pass  # it was in the queue of the gateway that ended first
    assert set(answers) <= {200, 503}
    assert answers[-4:] == [503] * 4
    assert {(connection, after > 0) for connection, after in refusals} == {("close", True)}
    for text in await asyncio.gather(*streams):
        assert '"error":' not in text
        assert text.endswith(END)
    async with asyncio.timeout(60):
        while Path(f"/proc/{state.pid}/exe").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
