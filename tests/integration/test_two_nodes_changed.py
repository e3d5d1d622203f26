"""An instance over two node agents, changed on purpose while answers stream: a rank moves to the
other node, all ranks get new processes, a rank and then an agent are told to end. Every stream has
the tokens that it has undisturbed, and nobody is declared dead."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cli.run_dir import read_state
from tests.support.cluster import Cluster, StreamResult, running_cluster

pytestmark = pytest.mark.timeout(300)
WAIT_S = 120.0
ROOT = Path(__file__).parents[2]
PROMPTS = ([5, 6, 7, 8], [9, 3, 1], [30, 2, 2, 2, 7])
NUM_TOKENS = 200


@asynccontextmanager
async def second_node(cluster: Cluster) -> AsyncIterator[asyncio.subprocess.Process]:
    """An agent that has no ranks of its own, as on another host."""
    async with asyncio.timeout(WAIT_S):
        while (state := read_state(cluster.run_dir)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    reach_etcd = ("--etcd-ca", state.etcd_ca) if state.etcd_ca else ()
    certificates = cluster.run_dir / "etcd" / "tls"
    user = certificates / f"starfish-{state.instance}-agent"
    rank_user = certificates / f"starfish-{state.instance}-rank"
    with (cluster.run_dir / "logs" / "agent-b.log").open("wb") as log:
        agent = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "node_agent", "--node", "b", "--ranks", ""),
            *("--etcd", state.etcd, *reach_etcd),
            *("--etcd-cert", f"{user}.pem", "--etcd-key", f"{user}.key"),
            *("--instance", state.instance, "--secret-file", state.secret_file),
            *("--model", state.model, "--log-json", "--log-dir", str(cluster.run_dir / "logs")),
            *("--", "--etcd-cert", f"{rank_user}.pem", "--etcd-key", f"{rank_user}.key"),
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
    try:
        yield agent
    finally:
        if agent.returncode is None:
            agent.send_signal(signal.SIGINT)
            await agent.wait()


async def starfish(cluster: Cluster, *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli", *arguments, "--run-dir", str(cluster.run_dir)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(WAIT_S):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()


async def has_new_process(cluster: Cluster, rank: int, old_pid: int) -> dict[int, int]:
    """Until the rank serves in another process; pid by rank."""
    async with asyncio.timeout(WAIT_S):
        while True:
            live = await cluster.live_ranks()
            if live.get(rank, old_pid) != old_pid and len(live) == 3:
                return live
            await asyncio.sleep(0.2)


def causes_of_verdicts(run_dir: Path) -> set[str]:
    """Of those that are no drains."""
    logs = "\n".join(log.read_text() for log in (run_dir / "logs").glob("control-plane-*.log"))
    entries = [json.loads(line) for line in logs.splitlines() if line.startswith("{")]
    return {entry["cause"] for entry in entries if entry["event"] == "rank_declared_dead"}


async def test_two_nodes(tmp_path: Path, small_model: Path) -> None:
    flags = ("--slots-per-rank", "5", "--redundant-experts", "4", "--log-json")
    async with (
        running_cluster(tmp_path / "run", small_model, ranks=3, flags=flags) as cluster,
        second_node(cluster) as agent,
    ):
        expected = [await cluster.stream(p, max_tokens=NUM_TOKENS) for p in PROMPTS]
        stop = asyncio.Event()
        streams = [asyncio.create_task(repeated(cluster, p, stop)) for p in PROMPTS]
        before = await cluster.live_ranks()

        await starfish(cluster, "replace", "1", "--node", "b", "--grace", "1")
        moved = await cluster.live_ranks()
        assert moved[1] != before[1]
        assert (moved[0], moved[2]) == (before[0], before[2])
        assert 1 in await ranks_of_node(cluster, "b")

        await starfish(cluster, "restart", "--rolling", "--grace", "1")
        restarted = await cluster.live_ranks()
        assert all(restarted[rank] != moved[rank] for rank in range(3))

        os.kill(restarted[0], signal.SIGTERM)
        again = await has_new_process(cluster, 0, restarted[0])
        assert (again[1], again[2]) == (restarted[1], restarted[2])

        agent.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            assert await agent.wait() == 0
        assert set(await cluster.live_ranks()) == {0, 2}

        stop.set()
        for stream, wanted in zip(streams, expected, strict=True):
            results = await stream
            assert {(r.token_ids, r.finish_reason, r.error) for r in results} == {
                (wanted.token_ids, "length", None)
            }
    assert causes_of_verdicts(tmp_path / "run") == set()


async def ranks_of_node(cluster: Cluster, node: str) -> set[int]:
    ranks = (await cluster.status())["ranks"]
    return {rank["rank"] for rank in ranks if rank["node"] == node}


async def repeated(cluster: Cluster, prompt: list[int], stop: asyncio.Event) -> list[StreamResult]:
    """One stream after the other; the last one is whole as well."""
    results = []
    while not stop.is_set():
        results.append(await cluster.stream(prompt, max_tokens=NUM_TOKENS))
    return results
