"""A rank that does not fit on its card is refused before anything is read, with what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpu_worker.cuda.card_memory import CardMemory
from gpu_worker.cuda.experts.expert_form import ExpertForm, NumberFormat
from shared.errors import ConfigError

FORM = ExpertForm(hidden_size=7168, inner_size=2048, dtype=torch.bfloat16)
SCALED = replace(FORM, number_format=NumberFormat.FP8)
NEEDED = CardMemory(
    form=FORM,
    num_layers=58,
    num_experts=256,
    slots_per_rank=16,
    shared_bytes=17_000_000_000,
    kv_bytes_per_token=80_000,
    kv_tokens=100_000,
)


def test_fp8_takes_half_the_bytes_and_its_scales() -> None:
    codes = 3 * 7168 * 2048
    assert FORM.num_bytes == 2 * codes
    assert SCALED.num_bytes == codes + 4 * (codes // 128**2)


def test_mxfp4_takes_a_quarter_of_the_bytes_and_its_scales() -> None:
    codes = 3 * 7168 * 2048 // 2
    in_mxfp4 = replace(FORM, number_format=NumberFormat.MXFP4)
    assert in_mxfp4.num_bytes == codes + codes // 16
    with pytest.raises(ConfigError, match=r"16 slots of experts in MXFP4 21\.7 GB"):
        replace(NEEDED, form=in_mxfp4).check(40_000_000_000)


def test_what_fits_is_not_refused() -> None:
    NEEDED.check(NEEDED.total_bytes)
    in_fp8 = replace(NEEDED, form=SCALED)
    in_fp8.check(80_000_000_000)


def test_too_many_slots_are_refused_with_the_number_that_fits() -> None:
    with pytest.raises(ConfigError) as refused:
        NEEDED.check(80_000_000_000)
    words = str(refused.value)
    assert "16 slots of experts in bfloat16 81.7 GB" in words
    assert "KV cache of 100000 tokens 8.0 GB" in words
    assert "10 slots fit (--slots-per-rank 10; 256 experts then need 26 ranks or more)" in words
    assert "--kv-tokens" not in words, "no KV cache is small enough"
    replace(NEEDED, slots_per_rank=10).check(80_000_000_000)
    with pytest.raises(ConfigError):
        replace(NEEDED, slots_per_rank=11).check(80_000_000_000)


def test_too_large_a_kv_cache_is_refused_with_the_tokens_that_fit() -> None:
    needed = replace(NEEDED, form=SCALED, kv_tokens=1_000_000)
    with pytest.raises(
        ConfigError, match=r"tokens of KV cache fit \(--kv-tokens (\d+)\)"
    ) as refused:
        needed.check(80_000_000_000)
    tokens = int(str(refused.value).rsplit("--kv-tokens ", 1)[1].rstrip(")"))
    replace(needed, kv_tokens=tokens).check(80_000_000_000)
    with pytest.raises(ConfigError):
        replace(needed, kv_tokens=tokens + 1).check(80_000_000_000)


def test_a_card_that_is_too_small_for_the_other_weights_is_told_so() -> None:
    with pytest.raises(ConfigError, match="use a larger card"):
        NEEDED.check(16_000_000_000)
