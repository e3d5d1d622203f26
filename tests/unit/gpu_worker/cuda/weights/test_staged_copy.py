"""Bytes arrive in their order, whatever part of them fits into a buffer and however many threads
fill it. Runs on the CPU; `tests/gpu/test_loading.py` has the card's part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.cuda.weights.staged_copy import StagedCopy

CPU = torch.device("cpu")
LONG = 9 * 2**20 + 13  # three pieces, each of a thread's


@pytest.mark.parametrize(
    ("num_bytes", "staging_bytes"),
    [(0, 8), (8, 8), (9, 8), (25, 8), (LONG, LONG), (LONG, 5 * 2**20)],
)
def test_bytes_arrive_in_order(num_bytes: int, staging_bytes: int) -> None:
    source = np.random.default_rng(4).integers(0, 256, num_bytes, dtype=np.uint8)
    out = torch.zeros(num_bytes, dtype=torch.uint8)
    with StagedCopy(CPU, staging_bytes=staging_bytes) as staged_copy:
        staged_copy.copy(source, out)
    assert np.array_equal(out.numpy(), source)


def test_a_tensor_of_another_size_is_refused() -> None:
    with StagedCopy(CPU) as staged_copy, pytest.raises(AssertionError, match="6 bytes for 8"):
        staged_copy.copy(np.zeros(6, dtype=np.uint8), torch.zeros(4, dtype=torch.bfloat16))
