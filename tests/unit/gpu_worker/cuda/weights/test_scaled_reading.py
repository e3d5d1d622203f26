"""Shared weights that a checkpoint stores in block-scaled FP8 reach the device as they are, if the
kernels take them so; otherwise in the model's dtype. Runs on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpu_worker.checkpoint.checkpoint import SINGLE_FILE, open_checkpoint
from gpu_worker.cuda.weights.scaled_blocks import ScaledBlocks
from gpu_worker.cuda.weights.staged_copy import StagedCopy
from gpu_worker.cuda.weights.weight_reader import WeightReader
from gpu_worker.model_tools import fp8_blocks

CPU = torch.device("cpu")
Shapes = dict[str, tuple[int, int]]


def stored(folder: Path, shapes: Shapes, *, plain: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """A checkpoint of random matrices in FP8, those of `plain` in bfloat16."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name in plain:
            tensors[name] = values.bfloat16()
        else:
            tensors[name], tensors[fp8_blocks.scales_name(name)] = fp8_blocks.quantise(values)
    save_file(tensors, folder / SINGLE_FILE)
    config = {"quantization_config": fp8_blocks.CONFIG}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def reader_of(folder: Path, shapes: Shapes) -> WeightReader:
    checkpoint = open_checkpoint(folder, shapes)
    return WeightReader(checkpoint, CPU, torch.bfloat16, StagedCopy(CPU))


def test_codes_and_scales_lie_one_below_the_other(tmp_path: Path) -> None:
    shapes = {"q": (256, 512), "k": (128, 512), "v": (200, 512)}
    tensors = stored(tmp_path, shapes)
    read = reader_of(tmp_path, shapes).read_matrix(*shapes)
    assert isinstance(read, ScaledBlocks)
    assert read.shape == (584, 512)
    codes = torch.cat([tensors[name].view(torch.uint8) for name in shapes])
    assert torch.equal(read.codes.view(torch.uint8), codes)
    scales = torch.cat([tensors[fp8_blocks.scales_name(name)] for name in shapes])
    assert torch.equal(read.scales, scales)
    assert read.scales.shape == (2 + 1 + 2, 4)


@pytest.mark.parametrize(
    ("shapes", "plain"),
    [
        ({"q": (200, 512), "k": (128, 512)}, ()),  # a block would go through rows of both
        ({"q": (128, 384)}, ()),  # its four parts would cut blocks
        ({"q": (128, 512), "k": (128, 512)}, ("k",)),
    ],
)
def test_what_the_kernels_do_not_take_so_is_widened(
    tmp_path: Path, shapes: Shapes, plain: tuple[str, ...]
) -> None:
    stored(tmp_path, shapes, plain=plain)
    reader = reader_of(tmp_path, shapes)
    read = reader.read_matrix(*shapes)
    assert isinstance(read, torch.Tensor)
    assert torch.equal(read, reader.read(*shapes))
    assert read.dtype == torch.bfloat16


def test_matrices_that_take_no_parts_may_have_any_size(tmp_path: Path) -> None:
    shapes = {"gate": (200, 384), "up": (200, 384)}
    stored(tmp_path, shapes)
    read = reader_of(tmp_path, shapes).read_matrix(*shapes, in_parts=False)
    assert isinstance(read, ScaledBlocks)
    assert read.scales.shape == (4, 3)


def test_a_width_without_parts_may_end_in_a_partial_block(tmp_path: Path) -> None:
    shapes = {"down": (64, 208)}
    stored(tmp_path, shapes)
    assert isinstance(reader_of(tmp_path, shapes).read_matrix("down"), ScaledBlocks)


def test_codes_and_scales_are_what_transformers_reads(tmp_path: Path) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    shapes = {"down": (256, 512)}
    tensors = stored(tmp_path, shapes)
    name = fp8_blocks.scales_name("down")
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(tensors["down"], tensors[name])
    ours = open_checkpoint(tmp_path, shapes).read("down")
    assert torch.equal(torch.from_numpy(ours), theirs)
