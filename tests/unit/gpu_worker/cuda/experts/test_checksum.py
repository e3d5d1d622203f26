"""The checksum of an expert's weights: every changed bit changes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.experts.checksum import checksum, checksum_of
from gpu_worker.cuda.experts.expert_form import ExpertForm, NumberFormat

HIDDEN, INNER = 24, 40
PLAIN = ExpertForm(hidden_size=HIDDEN, inner_size=INNER, dtype=torch.bfloat16)
BIASED = replace(PLAIN, biased=True)
NUM_VALUES = BIASED.num_values
SCALED = replace(PLAIN, hidden_size=272, inner_size=16, number_format=NumberFormat.FP8)
MXFP4 = replace(BIASED, hidden_size=160, inner_size=32, number_format=NumberFormat.MXFP4)
NUM_CODES = 3 * 272 * 16


def weights(dtype: torch.dtype, form: ExpertForm = BIASED) -> torch.Tensor:
    return torch.randn(form.num_values, generator=torch.Generator().manual_seed(1)).to(dtype)


@settings(deadline=None)
@given(st.integers(0, NUM_VALUES * 2 - 1), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(byte: int, bit: int) -> None:
    values = weights(torch.bfloat16)
    known = checksum_of(values, BIASED)
    values.view(torch.uint8)[byte] ^= 1 << bit
    assert checksum_of(values, BIASED) != known


@pytest.mark.parametrize("form", [SCALED, MXFP4], ids=["fp8", "mxfp4"])
@settings(deadline=None)
@given(byte=st.integers(0, SCALED.num_bytes - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_of_codes_and_scales_is_noticed(
    form: ExpertForm, byte: int, bit: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 256, (form.num_values,), generator=generator, dtype=torch.uint8)
    known = checksum_of(values, form)
    values[byte % form.num_bytes] ^= 1 << bit
    assert checksum_of(values, form) != known


@settings(deadline=None)
@given(st.integers(0, NUM_VALUES - 1), st.integers(0, NUM_VALUES - 1))
def test_exchanged_values_are_noticed(one: int, other: int) -> None:
    values = weights(torch.float32)
    form = replace(BIASED, dtype=torch.float32)
    known, same = checksum_of(values, form), values[one] == values[other]
    values[[one, other]] = values[[other, one]]
    assert (checksum_of(values, form) == known) == bool(same)


@pytest.mark.parametrize("form", [PLAIN, BIASED], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_slot_has_the_checksum_of_what_was_put_into_it(
    dtype: torch.dtype, form: ExpertForm
) -> None:
    form = replace(form, dtype=dtype)
    values = weights(dtype, form)
    parts = [part.clone() for part in form.split(values)]
    shapes = [(2 * INNER, HIDDEN), (HIDDEN, INNER), (2 * INNER,), (HIDDEN,)]
    assert [part.shape for part in parts] == shapes[: len(parts)]
    assert int(checksum(parts)) == checksum_of(values, form)


def test_a_scaled_expert_lies_in_codes_and_then_scales() -> None:
    gate_up, down, *scales = SCALED.split(torch.zeros(SCALED.num_values, dtype=torch.uint8))
    assert (gate_up.shape, down.shape) == ((32, 272), (272, 16))
    assert gate_up.dtype == down.dtype == torch.float8_e4m3fn
    assert [part.shape for part in scales] == [(2, 3), (3, 1)]
    assert all(part.dtype == torch.float32 for part in scales)
    assert SCALED.num_bytes == NUM_CODES + 4 * 9
    with pytest.raises(ValueError, match="13092 values"):
        SCALED.split(torch.zeros(NUM_CODES, dtype=torch.uint8))


def test_an_expert_in_mxfp4_lies_in_codes_then_scales_then_biases() -> None:
    parts = MXFP4.split(torch.zeros(MXFP4.num_values, dtype=torch.uint8))
    shapes = [(64, 80), (160, 16), (2, 64, 4), (1, 160, 4), (64,), (160,)]
    assert [part.shape for part in parts] == shapes
    assert [part.dtype for part in parts] == [torch.uint8] * 4 + [torch.bfloat16] * 2
    assert MXFP4.num_bytes == 3 * 160 * 32 // 2 + 4 * (2 * 64 + 160) + 2 * (64 + 160)


def test_an_expert_of_a_dense_model_has_no_weights_and_a_checksum() -> None:
    nothing = replace(PLAIN, inner_size=0)
    assert nothing.num_bytes == 0
    assert checksum_of(torch.zeros(0, dtype=torch.bfloat16), nothing) == 0


@pytest.mark.parametrize("num_bytes", [3, 6, 12, 24])
def test_weights_of_any_size_have_one(num_bytes: int) -> None:
    values = torch.arange(num_bytes, dtype=torch.uint8)
    known = int(checksum([values]))
    for byte in range(num_bytes):
        changed = values.clone()
        changed[byte] ^= 128
        assert int(checksum([changed])) != known


def test_values_exchanged_at_the_distance_of_a_power_of_two_are_noticed() -> None:
    values = torch.zeros(3 * 2**18, dtype=torch.int16)
    values[3] = -(2**15)
    known = int(checksum([values]))
    for bit in range(2, 17):
        exchanged = values.clone()
        exchanged[[3, 3 + 2**bit]] = exchanged[[3 + 2**bit, 3]]
        assert int(checksum([exchanged])) != known
