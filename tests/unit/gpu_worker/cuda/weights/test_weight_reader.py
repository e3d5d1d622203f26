"""Tensors reach the device as they are stored, in the model's dtype, whether or not they fit into
the pinned buffer. Runs on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpu_worker.checkpoint.checkpoint import SINGLE_FILE, open_checkpoint
from gpu_worker.cuda.weights.staged_copy import StagedCopy
from gpu_worker.cuda.weights.weight_reader import WeightReader

CPU = torch.device("cpu")
STORED = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=STORED, ids=str)
def tensors(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    shapes = {"q": (6, 8), "k": (2, 8), "norm": (8,)}
    return {name: torch.randn(shape).to(request.param) for name, shape in shapes.items()}


def reader_of(
    folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, staging_bytes: int
) -> WeightReader:
    save_file(tensors, folder / SINGLE_FILE)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    checkpoint = open_checkpoint(folder, shapes)
    return WeightReader(checkpoint, CPU, dtype, StagedCopy(CPU, staging_bytes=staging_bytes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("staging_bytes", [1, 7, 16, 47, 48, 100])
def test_reads_one_below_the_other(
    tmp_path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, staging_bytes: int
) -> None:
    reader = reader_of(tmp_path, tensors, dtype, staging_bytes)
    assert torch.equal(reader.read("norm"), tensors["norm"].to(dtype))
    expected = torch.cat([tensors["q"], tensors["k"]]).to(dtype)
    assert torch.equal(reader.read("q", "k"), expected)


def test_an_exact_read_rounds_nothing(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    reader = reader_of(tmp_path, tensors, torch.bfloat16, 100)
    assert torch.equal(reader.read_exact("norm"), tensors["norm"].float())
