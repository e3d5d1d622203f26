"""The last released wheel beside this tree, in one instance: each service in turn is of the one or
the other, while answers stream with the tokens that they have undisturbed. An upgrade, the roll
back, and a release that does not exist yet."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from shared.embedded_etcd import EmbeddedEtcd
from shared.keys import Keys
from shared.release import own_release
from tests.support.release_instance import NODE, TREE, ReleaseInstance, Service, running_instance
from tests.support.released_wheel import compile_kernels, unpacked_release

pytestmark = pytest.mark.timeout(900)
NUM_RANKS = 3
NUM_TOKENS = 150
PROMPTS = ([5, 6, 7, 8], [9, 3, 1], [30, 2, 2, 2, 7])
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "seed": 11},
    {"temperature": 0},
)
FUTURE = TREE / "tests" / "support" / "future_release"


@pytest.fixture(scope="module")
def model(small_model: Path) -> Path:
    compile_kernels(TREE, small_model)
    return small_model


@pytest.fixture(scope="module")
def released(model: Path) -> Path:
    folder = unpacked_release()
    compile_kernels(folder, model)
    return folder


class Clients:
    """Streams that begin again and again, at whatever gateway is the present one. A stream whose
    gateway ends goes on at the next one. Each must have the tokens of the first answer."""

    def __init__(self, http: aiohttp.ClientSession, gateway: Service) -> None:
        self.http, self.gateway = http, gateway
        self.expected: list[list[int]] = []
        self.num_answers = 0

    async def learn(self) -> None:
        self.expected = [await self.answer(number) for number in range(len(PROMPTS))]

    async def answer(self, number: int) -> list[int]:
        body = {
            "model": "model",
            "prompt": PROMPTS[number],
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "return_token_ids": True,
            "ignore_eos": True,
            **SAMPLING[number],
        }
        ids: list[int] = []
        last = ""
        for _ in range(20):
            headers = {"Last-Event-ID": last} if last else {}
            try:
                async with self.http.post(
                    f"http://127.0.0.1:{self.gateway.port}/v1/completions",
                    json=body,
                    headers=headers,
                ) as response:
                    assert response.status == 200, await response.text()
                    event_id = ""
                    async for raw in response.content:
                        line = raw.decode().strip()
                        if line.startswith("id: "):
                            event_id = line[4:]
                        elif line == "data: [DONE]":
                            return ids
                        elif line.startswith("data: "):
                            event = json.loads(line[6:])
                            if "error" in event:
                                break
                            for choice in event["choices"]:
                                ids += choice.get("token_ids") or []
                            last = event_id
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
        raise AssertionError("the stream could not be resumed")

    async def run(self, number: int) -> None:
        while True:
            assert await self.answer(number) == self.expected[number]
            self.num_answers += 1

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        """While the body runs; a wrong answer ends it."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.run(number)) for number in range(len(PROMPTS))]
            yield
            await self.until_answered()
            for task in tasks:
                task.cancel()

    async def until_answered(self) -> None:
        """Until each has been answered once more."""
        enough = self.num_answers + 2 * len(PROMPTS)
        async with asyncio.timeout(120):
            while self.num_answers < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


def protocols(status: dict[str, Any]) -> dict[int, int]:
    return {rank["rank"]: rank["release"]["protocol"] for rank in status["ranks"]}


@asynccontextmanager
async def instance_of(
    release: Path, etcd: EmbeddedEtcd, keys: Keys, model: Path, folder: Path
) -> AsyncIterator[tuple[ReleaseInstance, Clients, dict[str, Service]]]:
    """All of one release, and its clients."""
    async with running_instance(etcd, keys, model, folder, num_ranks=NUM_RANKS) as instance:
        try:
            control_plane = await instance.control_plane(release)
            agent = await instance.agent(release, f"0-{NUM_RANKS - 1}")
            gateway = await instance.gateway(release)
            clients = Clients(instance.http, gateway)
            await clients.learn()
            await instance.until_live(NUM_RANKS)
            services = {"control plane": control_plane, "agent": agent, "gateway": gateway}
            yield instance, clients, services
        except BaseException:
            print(instance.logs())
            raise


async def move_services(
    instance: ReleaseInstance, clients: Clients, services: dict[str, Service], release: Path
) -> None:
    """As docs/upgrade.md has it, up to the ranks' own turn."""
    standby = await instance.control_plane(release)
    await services["control plane"].stop()
    services["control plane"] = standby
    await clients.until_answered()

    clients.gateway = await instance.gateway(release)
    await services["gateway"].stop()
    services["gateway"] = clients.gateway
    await clients.until_answered()

    await services["agent"].kill()  # its ranks go on
    services["agent"] = await instance.agent(release, f"0-{NUM_RANKS - 1}")
    await clients.until_answered()


async def test_an_upgrade_rolls_through_all_services_and_back(
    etcd: EmbeddedEtcd, keys: Keys, model: Path, tmp_path: Path, released: Path
) -> None:
    new = own_release().protocol
    async with instance_of(released, etcd, keys, model, tmp_path) as (instance, clients, services):
        async with clients.streaming():
            before = await instance.until_live(NUM_RANKS)
            await move_services(instance, clients, services, TREE)
            after = await instance.until_live(NUM_RANKS)
            assert pids_of(after) == pids_of(before)  # nobody has restarted a rank
            assert set(protocols(after).values()) == {1}

            await instance.change("restart", "--rolling", "--rank", "1", "--grace", "1")
            mixed = await instance.until_live(NUM_RANKS)
            assert protocols(mixed) == {0: 1, 1: new, 2: 1}
            assert "Starfish 0.1 (protocol 1)" in await instance.starfish("status")
            await clients.until_answered()
            await instance.change("restart", "--rolling", "--grace", "1")
            upgraded = await instance.until_live(NUM_RANKS)
            assert protocols(upgraded) == dict.fromkeys(range(NUM_RANKS), new)
            assert len(upgraded["releases"]) == 1
            await clients.until_answered()

            # And back: the ranks first, as long as the control plane is the new one.
            await services["agent"].kill()
            services["agent"] = await instance.agent(released, f"0-{NUM_RANKS - 1}")
            await instance.change("restart", "--rolling", "--grace", "1")
            await move_services(instance, clients, services, released)
        back = await instance.until_live(NUM_RANKS)
        assert protocols(back) == dict.fromkeys(range(NUM_RANKS), 1)
        assert clients.num_answers > 20


def pids_of(status: dict[str, Any]) -> dict[int, int]:
    return {rank["rank"]: rank["pid"] for rank in status["ranks"]}


async def test_ranks_of_a_release_to_come_serve_beside_ours_or_are_refused_and_hurt_nobody(
    etcd: EmbeddedEtcd, keys: Keys, model: Path, tmp_path: Path
) -> None:
    async with instance_of(TREE, etcd, keys, model, tmp_path) as (instance, clients, services):
        path = os.pathsep.join((str(FUTURE), str(TREE)))
        async with clients.streaming():
            # It speaks our protocol, too.
            future = {"PYTHONPATH": path, "STARFISH_FUTURE": f"{own_release().protocol},90"}
            await instance.agent(TREE, "", node="host-2", **future)
            await instance.change("replace", "1", "--node", "host-2", "--grace", "1")
            status = await instance.until_live(NUM_RANKS)
            assert protocols(status)[1] == 90
            await clients.until_answered()
            await instance.change("replace", "1", "--node", NODE, "--grace", "1")

            # It does not: its rank says why, and ends; the others go on.
            strange = {"PYTHONPATH": path, "STARFISH_FUTURE": "80,90"}
            await instance.agent(TREE, "", node="host-3", **strange)
            await instance.change("scale", "--add", "1", "--node", "host-3", "--no-wait")
            said = await until_said(tmp_path / "rank-3.log", "cannot serve together")
            assert "Starfish 9.0.0 (protocols 80 to 90)" in said
            assert str(own_release()) in said
            standby = await instance.control_plane(TREE)
            await clients.until_answered()
            await standby.stop()
            status = await instance.status()
            assert {rank["rank"] for rank in status["ranks"] if rank["state"] == "live"} == {
                *range(NUM_RANKS)
            }

            # Nor does a gateway or a control plane of it take part.
            gateway = await refused(instance, "gateway", strange)
            assert "cannot serve together" in gateway
            await services["control plane"].kill()
            leader = await refused(instance, "control_plane", strange)
            assert "cannot serve together" in leader
            await clients.until_answered()
            services["control plane"] = await instance.control_plane(TREE)
            await instance.change("scale", str(NUM_RANKS))


async def until_said(log: Path, words: str) -> str:
    async with asyncio.timeout(120):
        while not (log.exists() and words in log.read_text()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return log.read_text()


async def refused(instance: ReleaseInstance, kind: str, environment: dict[str, str]) -> str:
    """What a service of that release says; it is ended then."""
    start = instance.start_gateway if kind == "gateway" else instance.control_plane
    service = await start(TREE, **environment)
    said = await until_said(service.log, "cannot serve together")
    await service.kill()
    return said
