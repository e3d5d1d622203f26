"""Memory that two processes map: who can open it, and that nothing of it is left behind."""

from __future__ import annotations

import gc
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gpu_worker.exchange.memory_outbox import mark_mapped
from gpu_worker.exchange.message import MessageLayout
from gpu_worker.exchange.regions import Quarantine, Regions
from gpu_worker.exchange.shared_memory import SharedMemory, open_shared_memory
from shared.types import Incarnation, Member, MemoryHandle, RankId
from tests.support.scripted_engine import ScriptedEngine

LAYOUT = MessageLayout(hidden_size=4, top_k=2, step_tokens_max=4)
NBYTES = 8192
NOBODY = 65534


@contextmanager
def process(work: Callable[[Connection], None]) -> Iterator[Connection]:
    """A process that does this and waits; killed in the end."""
    ours, theirs = Pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work(theirs)
            signal.pause()
        finally:
            os._exit(1)
    try:
        yield ours
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def map_region(handle: MemoryHandle, pipe: Connection) -> None:
    mark_mapped(open_shared_memory(handle, LAYOUT.region_bytes))
    pipe.send(None)


def num_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:starfish-")


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_one_process_writes_the_other_reads() -> None:
    shared = SharedMemory(NBYTES)

    def write(pipe: Connection) -> None:
        open_shared_memory(shared.handle, NBYTES)[7] = 5
        pipe.send(None)

    with process(write) as pipe:
        pipe.recv()
    assert shared.memory[7] == 5
    shared.close()


@pytest.mark.parametrize("wrong", ["name", "fd", "pid"])
def test_nothing_but_the_memory_of_that_name_is_opened(wrong: str, tmp_path: Path) -> None:
    shared = SharedMemory(NBYTES)
    with (tmp_path / "file").open("wb") as file:
        file.truncate(NBYTES)
        handles = {
            "name": replace(shared.handle, name="starfish-" + "0" * 32),
            "fd": replace(shared.handle, fd=file.fileno()),
            "pid": replace(shared.handle, pid=1),
        }
        refusal = r"starfish-|ermission|No such file"  # the last two: of another's descriptors
        with pytest.raises(OSError, match=refusal):
            open_shared_memory(handles[wrong], NBYTES)
    shared.close()


def test_nothing_is_opened_once_its_owner_has_closed_it() -> None:
    shared = SharedMemory(NBYTES)
    shared.close()
    with pytest.raises(OSError, match=r"starfish-|No such file"):
        open_shared_memory(shared.handle, NBYTES)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_open_it() -> None:
    shared = SharedMemory(NBYTES)

    def attempt(pipe: Connection) -> None:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            open_shared_memory(shared.handle, NBYTES)
        except PermissionError:
            pipe.send("refused")
        else:
            pipe.send("opened")

    with process(attempt) as pipe:
        assert pipe.recv() == "refused"
    shared.close()


def test_who_maps_it_cannot_take_it_away() -> None:
    shared = SharedMemory(NBYTES)
    fd = os.open(f"/proc/self/fd/{shared.handle.fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
    shared.close()


def test_without_memory_to_share_a_region_is_for_mooncake_alone() -> None:
    def give(pipe: Connection) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        regions = Regions(ScriptedEngine(), LAYOUT, Quarantine(), shares_memory=True)
        region = regions.give(Member(rank=RankId(1), incarnation=Incarnation(1)), 1, 0.0)
        pipe.send((region.handle, region.is_mapped))

    with process(give) as pipe:
        assert pipe.recv() == (None, False)


def test_twenty_killed_sources_leave_nothing_behind() -> None:
    engine, quarantine = ScriptedEngine(), Quarantine()
    regions = Regions(engine, LAYOUT, quarantine, shares_memory=True)
    gc.collect()
    mapped, descriptors = num_mapped(), num_descriptors()
    for incarnation in range(1, 21):
        source = Member(rank=RankId(1), incarnation=Incarnation(incarnation))
        handle = regions.give(source, 1, 0.0).handle
        assert handle is not None
        with process(partial(map_region, handle)) as pipe:
            pipe.recv()
            pipe.close()
        regions.retire(source, 0.0)
    assert not engine.registered
    gc.collect()
    assert (num_mapped(), num_descriptors()) == (mapped, descriptors)


def test_twenty_killed_owners_leave_nothing_behind() -> None:
    def share(pipe: Connection) -> None:
        shared = SharedMemory(NBYTES)
        pipe.send(shared.handle)
        signal.pause()
        shared.close()

    gc.collect()
    mapped, descriptors = num_mapped(), num_descriptors()
    for _ in range(20):
        with process(share) as pipe:
            memory = open_shared_memory(pipe.recv(), NBYTES)
            pipe.close()
        assert num_mapped() == mapped + 1
        memory[:] = 1  # it is still there
        del memory
    gc.collect()
    assert (num_mapped(), num_descriptors()) == (mapped, descriptors)
