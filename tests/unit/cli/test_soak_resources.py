"""What a real process uses is found in /proc, by the mark that it inherits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.bench.soak.growth import Quantity
from cli.bench.soak.resources import (
    Life,
    Usage,
    count_keys,
    folder_usage,
    read_processes,
    role_of,
    shared_memory_bytes,
)
from cli.up.leftovers import RUN_VARIABLE
from shared.keys import Keys
from shared.types import Incarnation, RankId
from tests.support.fake_clock import FakeClock
from tests.support.memory_store import MemoryEtcd, MemoryStore

MB = 1 << 20
MARK = f"soak-test-{os.getpid()}"
HOLD = """
import mmap, os, socket, sys, threading
files, sockets, threads, megabytes = map(int, sys.argv[1:])
held = [open("/dev/null") for _ in range(files)]
held += [socket.socket() for _ in range(sockets)]
memory = b"x" * (megabytes << 20)
fd = os.memfd_create("test")
os.ftruncate(fd, megabytes << 20)
mapped = [mmap.mmap(fd, megabytes << 20) for _ in range(2)]
for _ in range(threads):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(*numbers: int) -> Iterator[int]:
    """A process with so many files, sockets, threads and MB more than it needs."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {RUN_VARIABLE: MARK},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    try:
        yield process.pid
    finally:
        process.communicate(timeout=20)


def only(found: dict[Life, Usage], pid: int) -> tuple[Life, Usage]:
    ((life, usage),) = found.items()
    assert life.pid == pid
    return life, usage


def test_more_descriptors_sockets_threads_and_memory_are_seen() -> None:
    with holding(0, 0, 0, 1) as pid:
        _, few = only(read_processes(MARK, -1), pid)
    with holding(30, 20, 5, 64) as pid:
        life, many = only(read_processes(MARK, -1), pid)
        assert shared_memory_bytes([life]) == 64 * MB  # it is mapped twice
    more = {quantity: many[quantity] - few[quantity] for quantity in few}
    assert more[Quantity.DESCRIPTORS] == 50
    assert more[Quantity.SOCKETS] == 20
    assert more[Quantity.THREADS] == 5
    assert 60 * MB < more[Quantity.MEMORY] < 80 * MB


def test_the_owner_and_its_children_are_among_them() -> None:
    with holding(0, 0, 0, 1) as pid:
        found = {life.pid for life in read_processes("a mark that nobody has", os.getpid())}
    assert {os.getpid(), pid} <= found


def test_what_has_exited_is_not() -> None:
    with holding(0, 0, 0, 1):
        pass
    assert read_processes(MARK, -1) == {}


def test_the_role_of_a_process() -> None:
    assert role_of(["/usr/bin/python", "-m", "gateway.standby", "5"]) == "gateway.standby"
    assert role_of(["/usr/bin/etcd", "--name", "embedded"]) == "etcd"


def test_files_of_a_run_folder(tmp_path: Path) -> None:
    data = "etcd/data/member"
    for name in (
        *("logs/agent.log.1", "etcd/etcd.log", f"{data}/snap/db", f"{data}/wal/0.wal", "secret"),
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(64 << 10))
    usage = folder_usage(tmp_path)
    assert usage[Quantity.LOGS] >= 128 << 10
    assert usage[Quantity.ETCD_DATA] == usage[Quantity.RUN_FOLDER] == usage[Quantity.LOGS] / 2


async def test_keys_without_verdicts() -> None:
    store, keys = MemoryStore(MemoryEtcd(FakeClock())), Keys("soak")
    rank = RankId(3)
    for key in (
        keys.spec,
        keys.map,
        keys.verdict(rank, Incarnation(1)),
        keys.verdict(rank, Incarnation(2)),
        keys.verdict(rank, Incarnation(3)),
        Keys("other").spec,
    ):
        await store.put(key, b"")
    assert await count_keys(store, keys) == {
        Quantity.ETCD_KEYS: 2.0,
        Quantity.ETCD_VERDICTS: 3.0,
    }
