"""The checksum of an expert's weights: every changed bit changes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.experts.checksum import checksum, checksum_of
from gpu_worker.cuda.experts.expert_form import ExpertForm

NUM_VALUES = 3 * 40 * 24
SCALED = ExpertForm(hidden_size=272, inner_size=16, dtype=torch.bfloat16, scaled=True)
NUM_CODES = 3 * 272 * 16
BIASED = ExpertForm(hidden_size=24, inner_size=40, dtype=torch.bfloat16, biased=True)


def form(dtype: torch.dtype) -> ExpertForm:
    return ExpertForm(hidden_size=24, inner_size=40, dtype=dtype)


def weights(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(NUM_VALUES, generator=torch.Generator().manual_seed(1)).to(dtype)


@settings(deadline=None)
@given(st.integers(0, NUM_VALUES * 2 - 1), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(byte: int, bit: int) -> None:
    values = weights(torch.bfloat16)
    known = checksum_of(values, form(torch.bfloat16))
    values.view(torch.uint8)[byte] ^= 1 << bit
    assert checksum_of(values, form(torch.bfloat16)) != known


@settings(deadline=None)
@given(st.integers(0, SCALED.num_bytes - 1), st.integers(0, 7))
def test_every_flipped_bit_of_codes_and_scales_is_noticed(byte: int, bit: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 256, (SCALED.num_values,), generator=generator, dtype=torch.uint8)
    known = checksum_of(values, SCALED)
    values[byte] ^= 1 << bit
    assert checksum_of(values, SCALED) != known


@settings(deadline=None)
@given(st.integers(0, NUM_VALUES - 1), st.integers(0, NUM_VALUES - 1))
def test_exchanged_values_are_noticed(one: int, other: int) -> None:
    values = weights(torch.float32)
    floats = form(torch.float32)
    known, same = checksum_of(values, floats), values[one] == values[other]
    values[[one, other]] = values[[other, one]]
    assert (checksum_of(values, floats) == known) == bool(same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_slot_has_the_checksum_of_what_was_put_into_it(dtype: torch.dtype) -> None:
    values, split = weights(dtype), NUM_VALUES // 3 * 2
    gate_up, down = values[:split].clone().view(80, 24), values[split:].clone().view(24, 40)
    assert int(checksum([gate_up, down])) == checksum_of(values, form(dtype))


def test_a_biased_expert_has_its_biases_last_and_each_counts() -> None:
    values = torch.arange(BIASED.num_values).to(torch.bfloat16)
    parts = [part.clone() for part in BIASED.split(values)]
    assert [part.shape for part in parts] == [(80, 24), (24, 40), (80,), (24,)]
    assert int(checksum(parts)) == checksum_of(values, BIASED)
    known = checksum_of(values, BIASED)
    values[-1] = 0.0
    assert checksum_of(values, BIASED) != known


def test_an_expert_of_a_dense_model_has_no_weights_and_a_checksum() -> None:
    nothing = ExpertForm(hidden_size=24, inner_size=0, dtype=torch.bfloat16)
    assert nothing.num_bytes == 0
    assert checksum_of(torch.zeros(0, dtype=torch.bfloat16), nothing) == 0


def test_a_scaled_expert_lies_in_codes_and_then_scales() -> None:
    gate_up, down, *scales = SCALED.split(torch.zeros(SCALED.num_values, dtype=torch.uint8))
    assert (gate_up.shape, down.shape) == ((32, 272), (272, 16))
    assert gate_up.dtype == down.dtype == torch.float8_e4m3fn
    assert [part.shape for part in scales] == [(2, 3), (3, 1)]
    assert all(part.dtype == torch.float32 for part in scales)
    assert SCALED.num_bytes == NUM_CODES + 4 * 9
    with pytest.raises(ValueError, match="13092 values"):
        SCALED.split(torch.zeros(NUM_CODES, dtype=torch.uint8))
