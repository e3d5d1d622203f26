"""`kill_each_part.py URL PROJECT`: puts a load on the cluster of docker-compose.cluster.yml, kills
the main process of each of its parts in turn. Exits 0 if no stream got a
wrong token and every part came back.

Streams that break go on by `Last-Event-ID`, as a client of ours does. What is compared, and how, is
that of `starfish bench chaos`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from cli.bench.chaos.load import ChaosLoad
from cli.bench.chaos.statistics import Damage, damage_of
from cli.bench.stream_client import stream_client
from shared.clock import SystemClock

STREAMS, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 12, 24, 64
CALM_S, RETURN_S, STAYS_S, POLL_S = 3.0, 240.0, 8.0, 0.5


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout


class Cluster:
    def __init__(self, project: str) -> None:
        self._project = project

    def pid(self, service: str) -> int:
        """Of its main process; 0 if there is none."""
        return int(self._inspect(service)["State"]["Pid"])

    def is_healthy(self, service: str) -> bool:
        """Asks by the health check of its own. Without one it is, if it runs."""
        seen = self._inspect(service)
        check = seen["Config"].get("Healthcheck", {}).get("Test", ["CMD", "true"])[1:]
        command = ["docker", "exec", self._name(service), *check]
        runs = bool(seen["State"]["Running"]) and not seen["State"]["Restarting"]
        return runs and (
            check == ["true"] or subprocess.run(command, capture_output=True).returncode == 0
        )

    def kill(self, service: str) -> None:
        os.kill(self.pid(service), signal.SIGKILL)

    def kill_a_rank(self, service: str) -> None:
        """One of those that this host's agent runs."""
        rows = docker("top", self._name(service), "-eo", "pid,args").splitlines()[1:]
        ranks = [row.split(None, 1)[0] for row in rows if "gpu_worker --rank" in row]
        os.kill(int(ranks[0]), signal.SIGKILL)

    def _name(self, service: str) -> str:
        return f"{self._project}-{service}-1"

    def _inspect(self, service: str) -> dict[str, Any]:
        (seen,) = json.loads(docker("inspect", self._name(service)))
        return dict(seen)


async def main(url: str, project: str) -> int:
    cluster, clock = Cluster(project), SystemClock()
    async with stream_client(url, clock) as client:
        load = ChaosLoad(
            [client],
            clock,
            streams=STREAMS,
            num_prompts=PROMPTS,
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
            seed=1,
        )
        await load.learn()
        failed = 0
        for title, service, inject in faults(cluster):
            failed += not await survives(cluster, load, title, service, inject)
        return min(failed, 1)


def faults(cluster: Cluster) -> list[tuple[str, str, Callable[[], None]]]:
    """What is done, to which service, and how."""
    services = (
        *("etcd-0", "etcd-1", "etcd-2", "control-plane-0", "control-plane-1"),
        *("gateway-0", "gateway-1", "balancer", "host-0", "host-1"),
    )
    whole = [(f"kill {each}", each, partial(cluster.kill, each)) for each in services]
    return [("kill a rank of host-0", "host-0", partial(cluster.kill_a_rank, "host-0")), *whole]


async def survives(
    cluster: Cluster, load: ChaosLoad, title: str, service: str, inject: Callable[[], None]
) -> bool:
    async with load.running():
        await asyncio.sleep(CALM_S)
        await asyncio.to_thread(inject)
        back_s = await wait_until_back(cluster, service)
        began = tokens_so_far(load)
        await asyncio.sleep(CALM_S)
    wrong = sum(
        (
            damage_of(each.record.ids, load.expected[each.prompt], is_whole=not each.record.error)
            for each in load.streams
        ),
        Damage(),
    )
    lost = sum(each.record.error is not None for each in load.streams)
    resumed = sum(each.record.resumed for each in load.streams)
    goes_on = tokens_so_far(load) > began
    came = "never came back" if back_s is None else f"back after {back_s:.0f} s"
    print(
        f"{title}: {len(load.streams)} streams, {wrong.lost} tokens lost, {wrong.doubled} doubled, "
        f"{wrong.changed} changed; {resumed} resumed, {lost} refused or broken; {came}",
        flush=True,
    )
    return wrong == Damage() and back_s is not None and goes_on


def tokens_so_far(load: ChaosLoad) -> int:
    return sum(count for _, count in load.ticks)


async def wait_until_back(cluster: Cluster, service: str) -> float | None:
    """Seconds until the service was healthy, and stayed so for a while. None if it was not."""
    clock = SystemClock()
    began, since = clock.now(), None
    while (now := clock.now()) - began < RETURN_S:
        if not await asyncio.to_thread(cluster.is_healthy, service):
            since = None
        elif since is None:
            since = now
        elif now - since >= STAYS_S:
            return since - began
        await asyncio.sleep(POLL_S)
    return None


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
