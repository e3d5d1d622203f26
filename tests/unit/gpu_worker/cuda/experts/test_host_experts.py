"""The copies of experts on the host are those of the checkpoint, as many as fit, and all ranks
share them: any live rank fills them, and no rank rewrites a complete copy. Runs on the CPU, where
nothing is pinned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from gpu_worker.checkpoint.manifest import write_manifest
from gpu_worker.cuda.experts.expert_cache import ExpertCache
from gpu_worker.cuda.experts.expert_reader import ExpertReader
from gpu_worker.cuda.experts.host_experts import HostExperts, open_host_experts
from shared.expert_cache_memory import ExpertCacheMemory
from tests.unit.gpu_worker.cuda.experts.expert_folder import (
    NUM_EXPERTS,
    NUM_LAYERS,
    damage,
    header_of,
    memory_for,
    open_experts,
    prefix_of,
    save_experts,
    values_of,
)

CPU = torch.device("cpu")
PAIRS = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
PROCESS = Path(__file__).with_name("expert_cache_process.py")
ROOT = Path(__file__).parents[5]


def opened(folder: Path, memory: ExpertCacheMemory | None, reader: ExpertReader) -> HostExperts:
    return open_host_experts(reader, memory, header_of(folder, reader), CPU)


def filled(
    folder: Path, memory: ExpertCacheMemory | None, dtype: torch.dtype = torch.float32
) -> HostExperts:
    copies = opened(folder, memory, open_experts(folder, dtype))
    copies.fill_in_background()
    assert copies.wait_until_filled(timeout_s=30)
    return copies


def held_by(copies: HostExperts) -> set[tuple[int, int]]:
    return {pair for pair in PAIRS if copies.cached_values(*pair) is not None}


def check_all(copies: HostExperts, folder: Path) -> None:
    for pair in PAIRS:
        held = copies.cached_values(*pair)
        assert held is not None
        assert torch.equal(held, values_of(folder, *pair))


@contextmanager
def process_of(
    memory: ExpertCacheMemory, folder: Path, stuck_at: int = 0
) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed when the block ends."""
    with subprocess.Popen(
        [sys.executable, str(PROCESS), str(memory.fd), str(folder), str(stuck_at)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        pass_fds=[memory.fd],
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said_by(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_room_for_all_every_expert_is_there_as_stored(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    save_experts(tmp_path, dtype)
    check_all(filled(tmp_path, memory_for(100), dtype), tmp_path)


def test_float32_is_rounded_to_what_slots_hold(tmp_path: Path) -> None:
    save_experts(tmp_path)
    held = filled(tmp_path, memory_for(100), torch.bfloat16).cached_values(1, 4)
    assert held is not None
    assert torch.equal(held, values_of(tmp_path, 1, 4).bfloat16())


@pytest.mark.parametrize("staging_buffer", [0, 1, 4, 7, 11])
def test_layers_share_what_room_there_is(tmp_path: Path, staging_buffer: int) -> None:
    held = held_by(filled(save_experts(tmp_path), memory_for(staging_buffer)))
    assert len(held) == staging_buffer
    of_layer = [sum(layer == wanted for layer, _ in held) for wanted in range(NUM_LAYERS)]
    assert max(of_layer) - min(of_layer) <= 1


def test_a_rank_that_may_pin_less_has_a_part_of_the_same(tmp_path: Path) -> None:
    memory, little = memory_for(9), memory_for(4)
    assert memory is not None
    assert little is not None
    all_held = held_by(filled(save_experts(tmp_path), memory))
    less = opened(
        tmp_path,
        replace(memory, bytes_max=little.bytes_max),
        open_experts(tmp_path, torch.float32),
    )
    assert len(held_by(less)) == 4
    assert held_by(less) < all_held


def test_a_damaged_expert_ends_the_filling_with_its_name(tmp_path: Path) -> None:
    save_experts(tmp_path)
    write_manifest(tmp_path)
    name = f"{prefix_of(1, 4)}.up_proj.weight"
    damage(tmp_path, name)
    with capture_logs() as logs:
        copies = filled(tmp_path, memory_for(100))
    assert copies.cached_values(1, 4) is None
    assert copies.cached_values(1, 3) is not None
    assert logs[-1]["event"] == "host_experts_stopped"
    assert name in logs[-1]["detail"]


def test_a_second_rank_finds_all_and_reads_nothing(tmp_path: Path) -> None:
    memory = memory_for(100)
    filled(save_experts(tmp_path), memory)
    num_bytes: list[int] = []
    late = opened(tmp_path, memory, open_experts(tmp_path, torch.float32, num_bytes.append))
    check_all(late, tmp_path)
    late.fill_in_background()
    assert late.wait_until_filled(timeout_s=30)
    assert num_bytes == []


def test_copies_of_another_checkpoint_are_left_alone_and_it_is_said_why(tmp_path: Path) -> None:
    memory, mine = memory_for(100), tmp_path / "mine"
    mine.mkdir()
    first = filled(save_experts(mine), memory)
    other = Path(shutil.copytree(mine, tmp_path / "other"))
    damage(other, f"{prefix_of(0, 0)}.up_proj.weight")
    with capture_logs() as logs:
        copies = filled(other, memory)
    assert held_by(copies) == set()
    (log,) = logs
    assert log["event"] == "host_experts_unused"
    assert str(mine) in log["detail"]
    assert "fingerprint" in log["detail"]
    check_all(first, mine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "torch.float16"}, "dtype is torch.float32"),
        ({"num_experts": NUM_EXPERTS + 1}, f"num_experts is {NUM_EXPERTS}"),
        ({"form": 1}, "form is 2"),
    ],
)
def test_another_layout_is_no_expert_cache_of_ours(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    memory = memory_for(100)
    assert memory is not None
    save_experts(tmp_path)
    reader = open_experts(tmp_path, torch.float32)
    header = header_of(tmp_path, reader)
    ExpertCache(memory, header, reader.form).close()
    ExpertCache(memory, header, reader.form).close()
    with pytest.raises(ValueError, match=words):
        ExpertCache(memory, replace(header, **change), reader.form)  # type: ignore[arg-type]


def test_a_checkpoint_that_was_written_again_is_another(tmp_path: Path) -> None:
    save_experts(tmp_path)
    before = header_of(tmp_path, open_experts(tmp_path, torch.float32))
    assert header_of(tmp_path, open_experts(tmp_path, torch.float32)) == before
    damage(tmp_path, f"{prefix_of(0, 0)}.up_proj.weight")
    after = header_of(tmp_path, open_experts(tmp_path, torch.float32))
    assert after.fingerprint != before.fingerprint


def test_what_a_killed_rank_was_about_another_fills(tmp_path: Path) -> None:
    memory = memory_for(100)
    assert memory is not None
    save_experts(tmp_path)
    with process_of(memory, tmp_path, stuck_at=3) as dead:
        word, layer, expert = said_by(dead)
        assert word == "stuck"
        copies = opened(tmp_path, memory, open_experts(tmp_path, torch.float32))
        assert len(held_by(copies)) == 2
        assert copies.cached_values(int(layer), int(expert)) is None
        copies.fill_in_background()
    assert copies.wait_until_filled(timeout_s=60)
    check_all(copies, tmp_path)


def test_a_copy_that_another_is_about_waits_for_its_end(tmp_path: Path) -> None:
    memory = memory_for(100)
    assert memory is not None
    save_experts(tmp_path)
    reader = open_experts(tmp_path, torch.float32)
    cache = ExpertCache(memory, header_of(tmp_path, reader), reader.form)
    with process_of(memory, tmp_path, stuck_at=1) as busy:
        said_by(busy)
        written = [
            cache.fill(entry, lambda out_N: out_N.fill_(1.0), wait=False) for entry in range(3)
        ]
        assert written == [False, True, True]
        assert [cache.is_complete(entry) for entry in range(3)] == [False, True, True]
    assert cache.fill(0, lambda out_N: out_N.fill_(2.0), wait=True)
    assert (cache.entry_values(0) == 2.0).all()
    assert cache.fill(1, lambda out_N: out_N.fill_(3.0), wait=True)
    assert (cache.entry_values(1) == 1.0).all()


def test_ranks_share_the_work_and_a_later_one_has_none(tmp_path: Path) -> None:
    memory = memory_for(100)
    assert memory is not None
    save_experts(tmp_path)
    with process_of(memory, tmp_path) as one, process_of(memory, tmp_path) as two:
        reads = [int(said_by(process)[1]) for process in (one, two)]
    assert sum(reads) == len(PAIRS)
    with process_of(memory, tmp_path) as later:
        assert said_by(later) == ["read", "0"]
    check_all(opened(tmp_path, memory, open_experts(tmp_path, torch.float32)), tmp_path)


def test_after_the_end_no_copy_is_given(tmp_path: Path) -> None:
    copies = filled(save_experts(tmp_path), memory_for(100))
    copies.close()
    assert held_by(copies) == set()
