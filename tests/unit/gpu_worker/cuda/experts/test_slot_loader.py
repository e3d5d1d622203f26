"""A CUDA rank's loader makes its slots hold what is wanted, from copies on the host or from the
checkpoint, and says how far it is. On the CPU: slots copy wherever their weights lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from gpu_worker.checkpoint.checkpoint import SINGLE_FILE
from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.checkpoint.manifest import write_manifest
from gpu_worker.cuda.experts.host_experts import HostExperts, open_host_experts
from gpu_worker.cuda.experts.slot_loader import open_slot_loader
from gpu_worker.cuda.experts.slots import CudaSlots, SlotUpload
from shared.errors import CheckpointError
from shared.types import ABSENT_SLOT, EMPTY_SLOT
from tests.support.fake_clock import FakeClock
from tests.unit.gpu_worker.cuda.experts.expert_folder import (
    HIDDEN,
    INNER,
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
SLOTS = 3
FIRST = np.array([[0, 4, EMPTY_SLOT], [5, 3, 2]], dtype=np.int16)
SECOND = np.array([[0, 1, 2], [EMPTY_SLOT, 4, ABSENT_SLOT]], dtype=np.int16)


class Rank:
    def __init__(
        self, folder: Path, *, staging_buffer: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        progress = LoadProgress(FakeClock())
        self.bytes_read: list[int] = []

        def on_read(num_bytes: int) -> None:
            self.bytes_read.append(num_bytes)
            progress.count(num_bytes)

        reader = open_experts(folder, dtype, on_read)
        self.expert_bytes = reader.form.num_bytes
        self.folder = folder
        self.copies = open_host_experts(
            reader, memory_for(staging_buffer), header_of(folder, reader)
        )
        self.slots = CudaSlots(
            num_layers=NUM_LAYERS,
            slots_per_rank=SLOTS,
            hidden_size=HIDDEN,
            inner_size=INNER,
            device=CPU,
            dtype=dtype,
        )
        self.loader = open_slot_loader(
            slots=self.slots,
            reader=reader,
            host_experts=self.copies,
            progress=progress,
            device=CPU,
            num_readers=2,
        )

    def check(self, wanted: np.ndarray) -> None:
        """That slots hold the weights they claim, and claim what is wanted."""
        contents = self.slots.contents
        assert np.array_equal(contents, np.maximum(wanted, EMPTY_SLOT))
        for layer, slot in np.argwhere(contents >= 0):
            values = torch.cat(
                [
                    self.slots.w_gate_up_LSJH[layer, slot].flatten(),
                    self.slots.w_down_LSHI[layer, slot].flatten(),
                ]
            )
            stored = values_of(self.folder, layer, int(contents[layer, slot]))
            assert torch.equal(values, stored.to(values.dtype))


def test_slots_follow_what_is_wanted(tmp_path: Path) -> None:
    rank = Rank(save_experts(tmp_path))
    for wanted in (FIRST, SECOND, FIRST):
        assert np.array_equal(rank.loader.load(wanted), np.maximum(wanted, EMPTY_SLOT))
        rank.check(wanted)


def test_bfloat16_slots_hold_rounded_weights(tmp_path: Path) -> None:
    rank = Rank(save_experts(tmp_path), dtype=torch.bfloat16)
    rank.loader.load(FIRST)
    rank.check(FIRST)


def test_with_copies_on_the_host_no_file_is_read(tmp_path: Path) -> None:
    rank = Rank(save_experts(tmp_path), staging_buffer=100)
    rank.loader.load(FIRST)
    assert rank.copies.wait_until_filled(timeout_s=30)
    rank.folder = Path(shutil.copytree(tmp_path, tmp_path / "undamaged"))
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            damage(tmp_path, f"{prefix_of(layer, expert)}.gate_proj.weight")
    with capture_logs() as logs:
        rank.loader.load(SECOND)
    rank.check(SECOND)
    assert [(log["done"], log["total"], log["from_host"]) for log in logs] == [(3, 3, 3)]


def test_what_is_read_for_slots_is_left_as_copies(tmp_path: Path) -> None:
    rank = Rank(save_experts(tmp_path), staging_buffer=100)
    rank.loader.load(FIRST)
    assert rank.copies.wait_until_filled(timeout_s=30)
    assert sum(rank.bytes_read) == NUM_LAYERS * NUM_EXPERTS * rank.expert_bytes


def test_an_expert_in_several_slots_at_once_is_whole_in_each(tmp_path: Path) -> None:
    rank = Rank(save_experts(tmp_path), staging_buffer=100)
    wanted = np.array([[4, 4, 4], [5, 5, 2]], dtype=np.int16)
    rank.loader.load(wanted)
    rank.check(wanted)


def test_what_has_no_place_is_read_all_the_same(tmp_path: Path) -> None:
    rank = Rank(save_experts(tmp_path), staging_buffer=3)
    rank.loader.load(FIRST)
    rank.check(FIRST)
    rank.loader.load(SECOND)
    rank.check(SECOND)


def test_progress_ends_with_everything_and_counts_all_bytes(tmp_path: Path) -> None:
    rank = Rank(save_experts(tmp_path))
    with capture_logs() as logs:
        rank.loader.load(FIRST)
    (log,) = logs
    assert (log["event"], log["done"], log["total"], log["from_host"]) == (
        "experts_loaded",
        5,
        5,
        0,
    )
    assert log["tensors"] == 15


def test_what_becomes_a_copy_on_its_way_is_counted_once(tmp_path: Path) -> None:
    rank = Rank(save_experts(tmp_path), staging_buffer=100)
    with capture_logs() as logs:
        rank.loader.load(FIRST)
    assert [log["tensors"] for log in logs if log["event"] == "experts_loaded"] == [15]
    assert rank.copies.wait_until_filled(timeout_s=30)
    with capture_logs() as logs:
        rank.loader.load(SECOND)
    assert [log["tensors"] for log in logs if log["event"] == "experts_loaded"] == [3]


def test_a_damaged_expert_is_refused_by_name_and_others_stay(tmp_path: Path) -> None:
    write_manifest(save_experts(tmp_path))
    rank = Rank(tmp_path)
    rank.loader.load(FIRST)
    name = f"{prefix_of(0, 1)}.down_proj.weight"
    damage(tmp_path, name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        rank.loader.load(SECOND)
    contents = rank.slots.contents
    assert contents[0, 1] == FIRST[0, 1]
    rank.check(contents)


def test_a_file_that_vanished_under_its_name_is_still_read(tmp_path: Path) -> None:
    """A checkpoint is mapped when it is opened: replacing the file changes no rank that runs."""
    rank = Rank(save_experts(tmp_path))
    rank.loader.load(FIRST)
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / SINGLE_FILE).rename(kept / SINGLE_FILE)
    rank.folder = kept
    rank.loader.load(SECOND)
    rank.check(SECOND)


def test_an_assignment_for_other_slots_is_no_load(tmp_path: Path) -> None:
    rank = Rank(save_experts(tmp_path))
    with pytest.raises(AssertionError, match="other slots"):
        rank.loader.load(np.zeros((NUM_LAYERS, SLOTS + 1), dtype=np.int16))
    assert (rank.slots.contents == EMPTY_SLOT).all()


def flip_a_bit_of_copy(copies: HostExperts, layer: int, expert: int) -> None:
    values = copies.cached_values(layer, expert)
    assert values is not None
    values.view(torch.uint8)[11] ^= 4


def test_a_copy_that_is_damaged_is_replaced_from_the_checkpoint_and_never_used_again(
    tmp_path: Path,
) -> None:
    rank = Rank(save_experts(tmp_path), staging_buffer=100)
    rank.loader.load(FIRST)
    assert rank.copies.wait_until_filled(timeout_s=60)
    flip_a_bit_of_copy(rank.copies, 0, 1)
    with capture_logs() as logs:
        rank.loader.load(SECOND)
    rank.check(SECOND)
    told = [entry for entry in logs if entry["event"] == "expert_copy_damaged"]
    assert [(e["layer"], e["expert"], e["so_far"]) for e in told] == [(0, 1, 1)]
    assert rank.copies.cached_values(0, 1) is None
    with capture_logs() as logs:
        rank.loader.load(FIRST)
        rank.loader.load(SECOND)
    rank.check(SECOND)
    assert not [entry for entry in logs if entry["event"] == "expert_copy_damaged"]


def test_another_rank_of_the_host_does_not_get_a_rejected_copy(tmp_path: Path) -> None:
    memory = memory_for(100)
    reader = open_experts(save_experts(tmp_path), torch.float32)
    one, other = (open_host_experts(reader, memory, header_of(tmp_path, reader)) for _ in "ab")
    assert one.cache_expert(1, 2) is not None
    one.reject(1, 2)
    assert other.cached_values(1, 2) is None
    assert other.cache_expert(1, 2) is None


def test_damage_on_every_way_into_a_slot_is_an_error_and_the_slot_stays_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(save_experts(tmp_path))
    copy = rank.slots._copy

    def copy_badly(upload: SlotUpload) -> torch.Tensor | None:
        values = upload.values.clone()
        values.view(torch.uint8)[3] ^= 1
        return copy(upload._replace(values=values))

    monkeypatch.setattr(rank.slots, "_copy", copy_badly)
    with pytest.raises(CheckpointError, match="damaged twice"):
        rank.loader.load(FIRST)
    assert (rank.slots.contents == EMPTY_SLOT).all()
