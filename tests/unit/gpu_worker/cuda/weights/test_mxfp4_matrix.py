"""Codes and scales as a checkpoint has them get to where the kernels look for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.checkpoint.quantisation import Codes, decode_mxfp4
from gpu_worker.cuda.weights.mxfp4_matrix import (
    Mxfp4Matrix,
    in_turns,
    put_codes,
    put_scales,
    scale_words,
)
from tests.support.mxfp4_values import widened, widened_gate_up

ROWS = 48


def stored(columns: int, rows: int = ROWS) -> tuple[Codes, Codes]:
    rng = np.random.default_rng(columns)
    groups = columns // 32
    blocks = rng.integers(0, 256, (rows, groups, 16), dtype=np.uint8)
    return blocks, rng.integers(0, 250, (rows, groups), dtype=np.uint8)


def empty(columns: int, rows: int = ROWS) -> tuple[Codes, Codes]:
    codes = np.full((rows, columns // 2), 77, dtype=np.uint8)
    return codes, np.full((scale_words(columns), rows, 4), 77, dtype=np.uint8)


def matrix(codes: Codes, scales: Codes) -> Mxfp4Matrix:
    return Mxfp4Matrix(torch.from_numpy(codes)[None], torch.from_numpy(scales)[None])


@pytest.mark.parametrize("columns", [32, 96, 128, 160, 2880])
def test_what_is_put_stands_for_what_is_stored(columns: int) -> None:
    given, held = stored(columns), empty(columns)
    put_codes(given[0], held[0])
    put_scales(given[1], held[1])
    ours = widened(matrix(*held))[0]
    assert torch.equal(ours, torch.from_numpy(decode_mxfp4(*given)).double())
    assert not held[1].swapaxes(0, 1).reshape(ROWS, -1)[:, columns // 32 :].any()


def test_more_rows_than_are_put_at_once_are_put_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    given, whole, in_parts = stored(96), empty(96)[0], empty(96)[0]
    put_codes(given[0], whole)
    monkeypatch.setattr("gpu_worker.cuda.weights.mxfp4_matrix._GROUPS_MAX", 3 * 5)
    put_codes(given[0], in_parts)
    assert np.array_equal(in_parts, whole)


def test_rows_of_gate_and_of_up_take_turns_of_eight() -> None:
    blocks, scales = stored(96)
    held = empty(96)
    put_codes(in_turns(blocks), held[0].reshape(-1, 2, 8, 48))
    put_scales(in_turns(scales).reshape(scales.shape), held[1])
    values = torch.from_numpy(decode_mxfp4(blocks, scales)).double()
    gate, up = widened_gate_up(matrix(*held))[0].chunk(2)
    assert torch.equal(gate, values[::2])
    assert torch.equal(up, values[1::2])


def test_random_ones_have_about_the_deviation_that_is_asked_for() -> None:
    torch.manual_seed(0)
    random = matrix(*empty(256))
    random.fill_randomly(0.02)
    assert random.shape == (1, ROWS, 256)
    assert 0.02 / 1.5 < widened(random).std() < 0.02 * 1.5
