"""The checksum of an expert's weights: every changed bit changes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.experts.checksum import checksum, checksum_of

NUM_VALUES = 3 * 40 * 24


def weights(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(NUM_VALUES, generator=torch.Generator().manual_seed(1)).to(dtype)


@settings(deadline=None)
@given(st.integers(0, NUM_VALUES * 2 - 1), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(byte: int, bit: int) -> None:
    values = weights(torch.bfloat16)
    known = checksum_of(values)
    values.view(torch.uint8)[byte] ^= 1 << bit
    assert checksum_of(values) != known


@settings(deadline=None)
@given(st.integers(0, NUM_VALUES - 1), st.integers(0, NUM_VALUES - 1))
def test_exchanged_values_are_noticed(one: int, other: int) -> None:
    values = weights(torch.float32)
    known, same = checksum_of(values), values[one] == values[other]
    values[[one, other]] = values[[other, one]]
    assert (checksum_of(values) == known) == bool(same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_slot_has_the_checksum_of_what_was_put_into_it(dtype: torch.dtype) -> None:
    values, split = weights(dtype), NUM_VALUES // 3 * 2
    gate_up, down = values[:split].clone().view(80, 24), values[split:].clone().view(24, 40)
    assert int(checksum(gate_up, down)) == checksum_of(values)
