"""Copies of experts on the host are those of the checkpoint, as many as there is room for, those
first that no slot holds; and what is free on a host is read from its kernel. On the CPU: pinning is
the device's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from gpu_worker.cuda.expert_reader import ExpertReader
from gpu_worker.cuda.host_experts import HostExperts, bytes_for_copies, fill_order
from gpu_worker.cuda.host_memory import free_bytes
from gpu_worker.model.manifest import write_manifest
from shared.types import EMPTY_SLOT
from tests.unit.gpu_worker.cuda.expert_folder import (
    NUM_EXPERTS,
    NUM_LAYERS,
    damage,
    open_experts,
    prefix_of,
    save_experts,
    values_of,
)

CPU = torch.device("cpu")
RESIDENT = np.array([[0, 1, EMPTY_SLOT], [5, 3, 2]], dtype=np.int16)
PAIRS = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]


def filled(reader: ExpertReader, num_experts: int, experts_of_block: int) -> HostExperts:
    copies = HostExperts(
        reader,
        bytes_max=num_experts * reader.num_bytes + 1,
        device=CPU,
        block_bytes=experts_of_block * reader.num_bytes,
    )
    copies.reserve(len(PAIRS))
    copies.fill_in_background(RESIDENT, NUM_EXPERTS)
    assert copies.wait_until_filled(timeout_s=30)
    return copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_room_for_all_every_expert_is_there_as_stored(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    save_experts(tmp_path, dtype)
    copies = filled(open_experts(tmp_path, dtype), num_experts=100, experts_of_block=5)
    for layer, expert in PAIRS:
        held = copies.copy_of(layer, expert)
        assert held is not None
        assert torch.equal(held, values_of(tmp_path, layer, expert))


def test_float32_is_rounded_to_what_slots_hold(tmp_path: Path) -> None:
    save_experts(tmp_path)
    copies = filled(open_experts(tmp_path, torch.bfloat16), num_experts=100, experts_of_block=1)
    held = copies.copy_of(1, 4)
    assert held is not None
    assert torch.equal(held, values_of(tmp_path, 1, 4).bfloat16())


@pytest.mark.parametrize("room", [0, 1, 4, 7, 11])
def test_little_room_goes_to_experts_that_no_slot_holds(tmp_path: Path, room: int) -> None:
    save_experts(tmp_path)
    copies = filled(open_experts(tmp_path, torch.float32), room, experts_of_block=3)
    held = {pair for pair in PAIRS if copies.copy_of(*pair) is not None}
    assert len(held) == room
    resident = {(layer, int(e)) for layer in range(NUM_LAYERS) for e in RESIDENT[layer]}
    others = set(PAIRS) - resident
    assert held <= others or others <= held


def test_layers_share_what_room_there_is() -> None:
    first = list(fill_order(np.full((3, 1), EMPTY_SLOT, dtype=np.int16), 50))[:30]
    assert [sum(layer == wanted for layer, _ in first) for wanted in range(3)] == [10, 10, 10]


def test_a_damaged_expert_ends_the_filling_with_its_name(tmp_path: Path) -> None:
    save_experts(tmp_path)
    write_manifest(tmp_path)
    name = f"{prefix_of(1, 4)}.up_proj.weight"
    damage(tmp_path, name)
    with capture_logs() as logs:
        copies = filled(open_experts(tmp_path, torch.float32), 100, experts_of_block=5)
    assert copies.copy_of(1, 4) is None
    (log,) = logs
    assert log["event"] == "host_experts_stopped"
    assert name in log["detail"]


def test_by_default_the_ranks_of_a_host_share_a_quarter_of_what_is_free() -> None:
    assert 8 * bytes_for_copies(None, free_bytes=1600, ranks_of_host=8) == 400


def test_what_is_asked_for_is_taken_as_far_as_it_is_free() -> None:
    gb = 1_000_000_000
    assert bytes_for_copies(1.5, free_bytes=9 * gb, ranks_of_host=8) == 1.5 * gb
    assert bytes_for_copies(1.5, free_bytes=gb, ranks_of_host=8) == gb
    assert bytes_for_copies(0.0, free_bytes=gb, ranks_of_host=8) == 0


def test_what_is_free_ends_at_the_control_groups_limit(tmp_path: Path) -> None:
    memory_info, group = tmp_path / "meminfo", tmp_path / "group"
    memory_info.write_text("MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable: 100 kB\n")
    assert free_bytes(memory_info, group) == 100 * 1024
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    assert free_bytes(memory_info, group) == 100 * 1024
    (group / "memory.max").write_text("50000\n")
    (group / "memory.current").write_text("30000\n")
    (group / "memory.stat").write_text("anon 10000\nfile 7000\nfile_mapped 11\n")
    assert free_bytes(memory_info, group) == 27_000
