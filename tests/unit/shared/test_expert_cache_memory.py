"""Memory for copies of experts: how much, whose, and that nobody takes it from under others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from shared.expert_cache_memory import (
    create_memory,
    expert_cache_bytes,
    expert_cache_memory_of_rank,
    open_memory_of_process,
)

GB = 1_000_000_000


def test_by_default_a_quarter_of_what_is_free_is_taken() -> None:
    assert expert_cache_bytes(-1.0, free_bytes=1600) == 400


def test_what_is_asked_for_is_taken_as_far_as_it_is_free() -> None:
    assert expert_cache_bytes(1.5, free_bytes=9 * GB) == 1.5 * GB
    assert expert_cache_bytes(1.5, free_bytes=GB) == GB


def test_it_takes_no_room_before_it_is_touched_and_cannot_shrink() -> None:
    fd = create_memory(1 << 40)
    status = os.fstat(fd)
    assert (status.st_size, status.st_blocks) == (1 << 40, 0)
    for size in (1 << 39, 1 << 41):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_a_rank_uses_what_it_inherits_up_to_its_own_limit() -> None:
    fd = create_memory(3 * GB)
    for limit_gb, bytes_max in ((-1.0, 3 * GB), (2.0, 2 * GB), (9.0, 3 * GB)):
        memory = expert_cache_memory_of_rank(fd, limit_gb)
        assert memory is not None
        assert (memory.fd, memory.bytes_max) == (fd, bytes_max)
    assert expert_cache_memory_of_rank(fd, 0.0) is None
    os.close(fd)


def test_a_rank_that_inherits_none_has_its_own() -> None:
    memory = expert_cache_memory_of_rank(-1, 0.001)
    assert memory is not None
    assert os.fstat(memory.fd).st_size == memory.bytes_max == 1_000_000
    os.close(memory.fd)


def test_a_descriptor_that_is_none_costs_the_copies_alone() -> None:
    fd = create_memory(1)
    os.close(fd)
    with capture_logs() as logs:
        assert expert_cache_memory_of_rank(fd, -1.0) is None
    assert [log["event"] for log in logs] == ["no_host_experts"]


def test_memory_of_another_process_is_opened_and_nothing_else(tmp_path: Path) -> None:
    fd = create_memory(4096)
    ours = open_memory_of_process(os.getpid(), fd)
    os.pwrite(ours, b"same", 100)
    assert os.pread(fd, 4, 100) == b"same"
    with (tmp_path / "file").open("w+b") as file, pytest.raises(OSError, match="is not memory"):
        open_memory_of_process(os.getpid(), file.fileno())
    os.close(ours)
    os.close(fd)
