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


@pytest.mark.parametrize("num_bytes", [3, 6, 12, 24])
def test_weights_of_any_size_have_one(num_bytes: int) -> None:
    values = torch.arange(num_bytes, dtype=torch.uint8)
    known = checksum_of(values)
    for byte in range(num_bytes):
        changed = values.clone()
        changed[byte] ^= 128
        assert checksum_of(changed) != known


def test_values_exchanged_at_the_distance_of_a_power_of_two_are_noticed() -> None:
    values = torch.zeros(3 * 2**18, dtype=torch.int16)
    values[3] = -(2**15)
    known = checksum_of(values)
    for bit in range(2, 17):
        exchanged = values.clone()
        exchanged[[3, 3 + 2**bit]] = exchanged[[3 + 2**bit, 3]]
        assert checksum_of(exchanged) != known
