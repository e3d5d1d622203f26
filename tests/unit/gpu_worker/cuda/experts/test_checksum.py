"""The checksum of an expert's weights: every changed bit changes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.experts.checksum import checksum, checksum_of
from gpu_worker.cuda.experts.expert_form import ExpertForm

HIDDEN, INNER = 24, 40
PLAIN = ExpertForm(hidden_size=HIDDEN, inner_size=INNER, dtype=torch.bfloat16)
BIASED = replace(PLAIN, biased=True)
NUM_VALUES = BIASED.num_values


def weights(dtype: torch.dtype, form: ExpertForm = BIASED) -> torch.Tensor:
    return torch.randn(form.num_values, generator=torch.Generator().manual_seed(1)).to(dtype)


@settings(deadline=None)
@given(st.integers(0, NUM_VALUES * 2 - 1), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(byte: int, bit: int) -> None:
    values = weights(torch.bfloat16)
    known = checksum_of(values, BIASED)
    values.view(torch.uint8)[byte] ^= 1 << bit
    assert checksum_of(values, BIASED) != known


@settings(deadline=None)
@given(st.integers(0, NUM_VALUES - 1), st.integers(0, NUM_VALUES - 1))
def test_exchanged_values_are_noticed(one: int, other: int) -> None:
    values = weights(torch.float32)
    known, same = checksum_of(values, BIASED), values[one] == values[other]
    values[[one, other]] = values[[other, one]]
    assert (checksum_of(values, BIASED) == known) == bool(same)


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


def test_an_expert_of_a_dense_model_has_no_weights_and_a_checksum() -> None:
    nothing = replace(PLAIN, inner_size=0)
    assert nothing.num_bytes == 0
    assert checksum_of(torch.zeros(0, dtype=torch.bfloat16), nothing) == 0
