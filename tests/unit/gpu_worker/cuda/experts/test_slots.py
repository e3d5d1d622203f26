"""Slots hold what was loaded into them, and report it only once it is complete. Runs on the CPU,
because the class works on any device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.cuda.experts.slots import CudaSlots, SlotUpload
from shared.types import EMPTY_SLOT

HIDDEN, INNER = 8, 4


def make_slots() -> CudaSlots:
    return CudaSlots(
        num_layers=2,
        slots_per_rank=3,
        hidden_size=HIDDEN,
        inner_size=INNER,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def test_a_refill_lands_in_its_slot_alone_and_is_then_told() -> None:
    slots = make_slots()
    values = torch.arange(3 * INNER * HIDDEN, dtype=torch.float32) + 1
    slots.load([SlotUpload(1, 2, 17, values)])
    expected = np.full((2, 3), EMPTY_SLOT)
    expected[1, 2] = 17
    assert np.array_equal(slots.contents, expected)
    split = 2 * INNER * HIDDEN
    assert torch.equal(slots.w_gate_up_LSJH[1, 2], values[:split].view(2 * INNER, HIDDEN))
    assert torch.equal(slots.w_down_LSHI[1, 2], values[split:].view(HIDDEN, INNER))
    slots.w_gate_up_LSJH[1, 2].zero_()
    slots.w_down_LSHI[1, 2].zero_()
    assert not slots.w_gate_up_LSJH.any()
    assert not slots.w_down_LSHI.any()


def test_a_slot_whose_refill_fails_stays_empty() -> None:
    slots = make_slots()
    slots.load([SlotUpload(0, 0, 5, torch.ones(3 * INNER * HIDDEN))])
    too_short = torch.ones(INNER)
    with pytest.raises(ValueError, match="an expert has 96 values"):
        slots.load([SlotUpload(0, 0, 6, too_short)])
    assert slots.contents[0, 0] == EMPTY_SLOT
