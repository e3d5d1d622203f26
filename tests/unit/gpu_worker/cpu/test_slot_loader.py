"""Loading says how far it is, in counts, bytes and rate, at sane intervals."""

from __future__ import annotations

import numpy as np
from structlog.testing import capture_logs

from gpu_worker.checkpoint.load_progress import LOG_EVERY_S, LoadProgress
from gpu_worker.cpu.expert_slots import ExpertSlots, MlpSlot
from gpu_worker.cpu.slot_loader import PROGRESS_EVERY, ExpertSlotLoader
from tests.support.fake_clock import FakeClock

MB = 1_000_000


def test_reading_is_said_now_and_then_with_its_rate() -> None:
    clock = FakeClock()
    progress = LoadProgress(clock)
    with capture_logs() as logs:
        for _ in range(12):
            clock.advance(LOG_EVERY_S / 4)
            progress.count(500 * MB)
    assert [(log["tensors"], log["gb"], log["gb_per_s"]) for log in logs] == [
        (4, 2.0, 0.4),
        (8, 4.0, 0.4),
        (12, 6.0, 0.4),
    ]


def test_a_new_load_counts_from_nothing() -> None:
    clock = FakeClock()
    progress = LoadProgress(clock)
    progress.count(500 * MB)
    clock.advance(100)
    progress.restart()
    progress.count(250 * MB)
    clock.advance(0.5)
    assert progress.log_fields() == {"tensors": 1, "gb": 0.25, "gb_per_s": 0.5}


def test_experts_are_counted_and_the_last_is_always_said() -> None:
    clock = FakeClock()
    progress = LoadProgress(clock)

    def read(layer: int, expert: int, slot: MlpSlot) -> None:
        clock.advance(0.001)
        progress.count(3 * MB)

    num_experts = PROGRESS_EVERY + 3
    slots = ExpertSlots(
        num_layers=1, slots_per_rank=num_experts, hidden_size=1, inner_size=1, read_expert=read
    )
    wanted = np.arange(num_experts, dtype=np.int16)[np.newaxis]
    with capture_logs() as logs:
        held = ExpertSlotLoader(slots, progress).load(wanted)
    assert np.array_equal(held, wanted)
    assert [(log["event"], log["done"], log["total"], log["gb"]) for log in logs] == [
        ("experts_loaded", 64, 67, 0.192),
        ("experts_loaded", 67, 67, 0.201),
    ]
    assert logs[-1]["gb_per_s"] == 3.0
