"""The node agent with real processes, real signals and a real etcd: how incarnations begin and
end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.embedded_etcd import EmbeddedEtcd, embedded_etcd
from shared.etcd_permissions import EtcdService
from shared.etcd_store import EtcdStore, connect_store
from shared.keys import Keys
from shared.records import AgentRecord, ProcessView, RankRecord, Suspicion, unpack_record
from shared.release import own_release
from shared.types import NodeId, ProcessState, RankId, SuspicionReason
from tests.support.etcd import flags_of
from tests.support.processes import is_running

TOY_AGENT = Path(__file__).parents[1] / "support" / "toy_agent.py"
ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
Agent = asyncio.subprocess.Process

pytestmark = pytest.mark.timeout(300)


class Node:
    """One node's agents, one after the other, and what etcd says of its ranks."""

    def __init__(self, folder: Path, etcd: EmbeddedEtcd, store: EtcdStore) -> None:
        self.folder, self.etcd, self.store = folder, etcd, store
        self.keys = Keys(uuid.uuid4().hex[:12])
        self.pids: set[int] = set()
        self.agents: list[Agent] = []

    async def start(
        self,
        *flags: str,
        toy: str = "obedient",
        fds: tuple[int, ...] = (),
        fork_server: str = "",
    ) -> Agent:
        with (self.folder / "agent.log").open("ab") as log:
            agent = await asyncio.create_subprocess_exec(
                *(sys.executable, str(TOY_AGENT), "--node", "n", "--log-dir", str(self.folder)),
                *(*flags_of(self.etcd, self.keys, EtcdService.AGENT), *flags),
                *("--", *flags_of(self.etcd, self.keys, EtcdService.RANK), "--toy", toy),
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT), "TOY_FORK_SERVER": fork_server},
                pass_fds=fds,
            )
        self.agents.append(agent)
        return agent

    async def records(self) -> dict[int, RankRecord]:
        found = (await self.store.get_prefix(self.keys.ranks)).values
        records = [unpack_record(kv.value, RankRecord) for kv in found]
        self.pids |= {record.pid for record in records}
        return {record.rank: record for record in records}

    async def until(
        self, true_of: Callable[[dict[int, RankRecord]], bool]
    ) -> dict[int, RankRecord]:
        found: dict[int, RankRecord] = {}

        async def holds() -> bool:
            nonlocal found
            found = await self.records()
            return true_of(found)

        await until(holds)
        return found

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = (self.folder / "agent.log").read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry for entry in entries if entry["event"] == event]

    def forked(self) -> list[bool]:
        """Of each started rank."""
        return [entry["forked"] for entry in self.logged("rank_started")]

    async def until_started(self, number: int) -> list[bool]:
        """Until so many ranks have been started, in the log as well; whether each was forked."""

        async def holds() -> bool:
            return len(self.forked()) >= number

        await until(holds)
        return self.forked()

    def alive(self) -> set[int]:
        return {pid for pid in self.pids if is_running(pid)}


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command: state, parent, group, session, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children_of(parent: int) -> list[int]:
    """Also those that have ended."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            _, parent_of_entry, *_ = stat_of(int(entry.name))
            if parent_of_entry == str(parent):
                found.append(int(entry.name))
    return found


def shared_memory_of(pid: int) -> int:
    """Which file it is that the process has been handed for copies of experts."""
    argv = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    fd = argv[argv.index("--host-experts-fd") + 1]
    status = os.stat(f"/proc/{pid}/fd/{fd}")
    assert status.st_size == 1_000_000
    return status.st_ino


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def ended(agent: Agent) -> int:
    async with asyncio.timeout(WAIT_S):
        return await agent.wait()


@asynccontextmanager
async def node_of(folder: Path, etcd: EmbeddedEtcd) -> AsyncIterator[Node]:
    store = await connect_store(etcd.root)
    node = Node(folder, etcd, store)
    await etcd.admit(node.keys)
    try:
        yield node
    finally:
        await store.close()
        for pid in node.alive() | {agent.pid for agent in node.agents if agent.returncode is None}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
async def node(tmp_path: Path, shared_etcd: EmbeddedEtcd) -> AsyncIterator[Node]:
    async with node_of(tmp_path, shared_etcd) as running:
        yield running


@pytest.mark.parametrize("flag", ["--fork-ranks", "--no-fork-ranks"])
async def test_each_rank_is_started_and_a_stop_leaves_nothing(node: Node, flag: str) -> None:
    agent = await node.start("--ranks", "0-1", flag)
    records = await node.until(lambda records: len(records) == 2)
    assert {r.incarnation for r in records.values()} == {1}
    told = await node.store.get(node.keys.agent(NodeId("n")))
    assert told is not None
    assert unpack_record(told.value, AgentRecord) == AgentRecord(
        node=NodeId("n"),
        pid=agent.pid,
        ranks=(RankId(0), RankId(1)),
        release=own_release(),
    )
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0
    assert node.alive() == set()
    left = [kv.key for kv in (await node.store.get_prefix(node.keys.root)).values]
    assert left == [node.keys.incarnation_counter(RankId(r)) for r in (0, 1)]
    assert node.forked() == [flag == "--fork-ranks"] * 2


async def test_a_forked_rank_is_in_every_way_like_one_that_was_executed(node: Node) -> None:
    def shape_of(pid: int) -> tuple[list[str], list[str], dict[str, str], set[str]]:
        argv = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
        del argv[argv.index("--lease-id") : argv.index("--lease-id") + 2]
        environment = dict(
            entry.split("=", 1)
            for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")
            if entry
        )
        environment.pop("OPENBLAS_NUM_THREADS", None)
        _, parent, _, session, *_ = stat_of(pid)
        fds = set()
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                fds.add(os.readlink(fd))
        files = {fd for fd in fds if fd.startswith("/")}
        return argv, [str(int(parent) == agent.pid), str(int(session) == pid)], environment, files

    shapes = []
    for flag in ("--fork-ranks", "--no-fork-ranks"):
        agent = await node.start("--ranks", "0", flag)
        records = await node.until(lambda records: len(records) == 1)
        shapes.append(shape_of(records[0].pid))
        agent.send_signal(signal.SIGTERM)
        assert await ended(agent) == 0
        await node.store.delete(node.keys.incarnation_counter(RankId(0)))
    assert node.forked() == [True, False]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("fork", ["--fork-ranks", "--no-fork-ranks"])
async def test_a_rank_that_is_stopped_or_continued_is_reported(node: Node, fork: str) -> None:
    agent = await node.start("--ranks", "0", fork)
    record = (await node.until(lambda records: len(records) == 1))[0]

    async def reported() -> list[tuple[int, ProcessState]]:
        found = (await node.store.get_prefix(node.keys.views)).values
        views = [unpack_record(kv.value, ProcessView) for kv in found]
        return [(view.rank, view.state) for view in views]

    async def is_stopped() -> bool:
        return await reported() == [(0, ProcessState.STOPPED)]

    async def goes_on() -> bool:
        """Running, or on a busy machine starved or asleep when it was looked at."""
        return [rank for rank, state in await reported() if state is not ProcessState.STOPPED] == [
            0
        ]

    os.kill(record.pid, signal.SIGSTOP)
    await until(is_stopped)
    os.kill(record.pid, signal.SIGCONT)
    await until(goes_on)
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0


async def test_a_killed_fork_server_is_replaced_and_takes_no_rank_with_it(node: Node) -> None:
    agent = await node.start("--ranks", "0-1")
    before = await node.until(lambda records: len(records) == 2)
    (ready,) = node.logged("fork_server_ready")
    os.kill(ready["pid"], signal.SIGKILL)
    await until(lambda: asyncio.to_thread(lambda: not is_running(ready["pid"])))
    await until(lambda: asyncio.to_thread(lambda: len(node.logged("fork_server_ready")) == 2))
    assert await node.records() == before, "another one is ready before any rank needs it"
    os.kill(before[1].pid, signal.SIGKILL)
    after = await node.until(lambda records: len(records) == 2 and records[1] != before[1])
    assert after[0] == before[0]
    assert await node.until_started(3) == [True, True, True]
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0
    assert node.alive() == set()


@pytest.mark.parametrize("fork_server", ["broken", "threaded"])
async def test_without_a_fork_server_that_works_ranks_are_executed(
    node: Node, fork_server: str
) -> None:
    agent = await node.start("--ranks", "0-1", fork_server=fork_server)
    await node.until(lambda records: len(records) == 2)
    assert await node.until_started(2) == [False, False]
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0


async def test_a_rank_outlives_a_wait_for_its_fork_server_that_is_longer_than_its_lease(
    node: Node,
) -> None:
    agent = await node.start("--ranks", "0-1", "--lease-ttl-s", "3", fork_server="slow")
    records = await node.until(lambda records: len(records) == 2)
    assert {record.incarnation for record in records.values()} == {1}
    assert node.logged("rank_exited") == []
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0


async def test_a_fork_that_crashed_before_it_registered_is_followed_by_an_executed_rank(
    node: Node,
) -> None:
    agent = await node.start("--ranks", "0", toy="exit-70")

    assert (await node.until_started(3))[:3] == [True, False, True]
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0


async def test_children_that_a_killed_rank_leaves_behind_are_reaped(node: Node) -> None:
    agent = await node.start("--ranks", "0", toy="parent")
    before = await node.until(lambda records: len(records) == 1)
    (orphan,) = children_of(before[0].pid)
    os.kill(before[0].pid, signal.SIGKILL)
    await node.until(lambda records: len(records) == 1 and records[0] != before[0])
    # One that has ended and that nobody has waited for would stay.
    await until(lambda: asyncio.to_thread(lambda: not Path(f"/proc/{orphan}").exists()))
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0


async def test_the_fork_server_ends_with_its_agent(node: Node) -> None:
    agent = await node.start("--ranks", "0")
    await node.until(lambda records: len(records) == 1)
    (ready,) = node.logged("fork_server_ready")
    agent.kill()
    await ended(agent)
    await until(lambda: asyncio.to_thread(lambda: not is_running(ready["pid"])))


@pytest.mark.parametrize(
    ("poll_ms", "details"),
    [("0", {"killed by SIGKILL"}), ("1", {"killed by SIGKILL", "exited"})],
)
async def test_a_killed_rank_is_reported_and_restarted(
    node: Node, poll_ms: str, details: set[str]
) -> None:
    agent = await node.start("--ranks", "0-1", "--lease-ttl-s", "60", "--dying-poll-ms", poll_ms)
    before = await node.until(lambda records: len(records) == 2)
    watch = node.store.watch(node.keys.ranks)
    await anext(watch)
    os.kill(before[1].pid, signal.SIGKILL)
    async with asyncio.timeout(WAIT_S):  # far less than the lease would have lasted
        event = await anext(watch)
    assert (event.key, event.value) == (node.keys.rank(RankId(1), before[1].incarnation), None)
    await watch.aclose()
    after = await node.until(lambda records: len(records) == 2 and records[1] != before[1])
    assert after[1].incarnation == 2
    assert after[0] == before[0]

    async def is_told() -> bool:
        return bool((await node.store.get_prefix(node.keys.suspicions)).values)

    await until(is_told)
    (kv,) = (await node.store.get_prefix(node.keys.suspicions)).values
    said = unpack_record(kv.value, Suspicion)
    assert (said.rank, said.incarnation, said.reason) == (1, 1, SuspicionReason.EXIT)
    assert said.detail in details
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0


async def test_all_incarnations_share_one_expert_cache_and_the_killed_leave_it(node: Node) -> None:
    agent = await node.start("--ranks", "0-1", "--host-experts-gb", "0.001")
    before = await node.until(lambda records: len(records) == 2)
    memory = shared_memory_of(before[0].pid)
    assert shared_memory_of(before[1].pid) == memory
    os.kill(before[1].pid, signal.SIGKILL)
    after = await node.until(lambda records: len(records) == 2 and records[1] != before[1])
    assert shared_memory_of(after[1].pid) == memory
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0


async def test_a_fenced_rank_is_restarted_again_and_again_without_backoff(node: Node) -> None:
    agent = await node.start("--ranks", "3", toy="exit-75")
    counter = node.keys.incarnation_counter(RankId(3))

    async def has_many_incarnations() -> bool:
        known = await node.store.get(counter)
        return known is not None and int(known.value) >= 4

    await until(has_many_incarnations)
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0


async def test_an_agent_tells_why_a_rank_does_not_come_and_when_it_starts_again(
    node: Node,
) -> None:
    agent = await node.start("--ranks", "3", "--no-fork-ranks", toy="complain")

    async def told() -> bool:
        found = await node.store.get(node.keys.agent(NodeId("n")))
        if found is None:
            return False
        waiting = unpack_record(found.value, AgentRecord).waiting
        assert all(each.rank == 3 and each.until > time.time() - 60 for each in waiting)
        return [each.why for each in waiting] == ["model.safetensors is truncated"]

    await until(told)
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0


async def test_a_rank_that_ignores_the_end_is_killed_after_the_grace_time(node: Node) -> None:
    agent = await node.start("--ranks", "0", "--stop-grace-s", "0.3", toy="ignore-the-end")
    await node.until(lambda records: len(records) == 1)
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0
    assert node.alive() == set()


async def test_a_new_agent_adopts_the_ranks_of_a_killed_one(node: Node) -> None:
    first = await node.start("--ranks", "0-1", "--lease-ttl-s", "60")
    before = await node.until(lambda records: len(records) == 2)
    first.kill()
    await ended(first)
    os.kill(before[0].pid, signal.SIGKILL)  # while nobody watches
    second = await node.start("--ranks", "0-1", "--lease-ttl-s", "60")
    after = await node.until(
        lambda records: len(records) == 2 and records[0].incarnation > before[0].incarnation
    )
    assert after[1] == before[1]
    os.kill(after[1].pid, signal.SIGKILL)  # an adopted life's end is seen as well
    again = await node.until(lambda records: 1 in records and records[1].incarnation == 2)
    assert again[0] == after[0]
    second.send_signal(signal.SIGTERM)
    assert await ended(second) == 0
    assert node.alive() == set()


@pytest.mark.parametrize("toy", ["obedient", "ignore-the-end"])
async def test_the_end_of_the_lifeline_ends_the_agent_and_its_ranks(node: Node, toy: str) -> None:
    read_end, write_end = os.pipe()
    agent = await node.start(
        "--ranks", "0-1", "--lifeline-fd", str(read_end), toy=toy, fds=(read_end,)
    )
    os.close(read_end)
    await node.until(lambda records: len(records) == 2)
    os.close(write_end)
    assert await ended(agent) == 0
    assert node.alive() == set()


async def test_an_agent_whose_lease_was_lost_registers_again(node: Node) -> None:
    agent = await node.start("--ranks", "0", "--lease-ttl-s", "2")
    await node.until(lambda records: len(records) == 1)
    key = node.keys.agent(NodeId("n"))
    before = await node.store.get(key)
    assert before is not None
    await node.store.revoke_lease(before.lease_id)
    assert await node.store.get(key) is None

    async def is_registered_again() -> bool:
        after = await node.store.get(key)
        return after is not None and after.value == before.value

    await until(is_registered_again)
    agent.send_signal(signal.SIGTERM)
    assert await ended(agent) == 0
    assert await node.store.get(key) is None


async def test_with_etcd_away_ranks_run_on_and_deaths_are_told_later(tmp_path: Path) -> None:
    async with (
        embedded_etcd(tmp_path / "etcd") as etcd,
        node_of(tmp_path, etcd) as node,
    ):
        agent = await node.start("--ranks", "0-1", "--lease-ttl-s", "60")
        before = await node.until(lambda records: len(records) == 2)
        await etcd.kill()
        os.kill(before[1].pid, signal.SIGKILL)
        await until(lambda: asyncio.to_thread(lambda: not is_running(before[1].pid)))
        assert is_running(before[0].pid)
        await etcd.start()
        after = await node.until(lambda records: len(records) == 2 and records[1].incarnation > 1)
        assert after[0] == before[0]
        agent.send_signal(signal.SIGTERM)
        assert await ended(agent) == 0
