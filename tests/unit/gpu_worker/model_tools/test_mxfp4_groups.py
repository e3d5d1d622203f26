"""Checkpoints in MXFP4 that are made here are such as gpt-oss is published in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.checkpoint.checkpoint import open_checkpoint
from gpu_worker.checkpoint.quantisation import decode_mxfp4
from gpu_worker.model_tools import mxfp4_groups
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.errors import CheckpointError
from shared.model_spec import read_model_spec

NAME = "model.layers.1.mlp.experts.down_proj"


def decoded(values_EIO: torch.Tensor) -> torch.Tensor:
    blocks, scales = mxfp4_groups.quantise(values_EIO)
    shape = tuple(values_EIO.shape)
    assert blocks.shape == mxfp4_groups.blocks_shape(shape)
    assert scales.shape == mxfp4_groups.scales_shape(shape)
    return torch.from_numpy(decode_mxfp4(blocks.numpy(), scales.numpy())).transpose(1, 2)


def test_every_value_becomes_the_nearest_that_its_group_has() -> None:
    values = torch.randn(3, 64, 10, generator=torch.Generator().manual_seed(1))
    read = decoded(values)
    groups = values.transpose(1, 2).reshape(3, 10, 2, 32)
    unit = torch.exp2(groups.abs().amax(-1).log2().floor() - 2)[..., None]
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = (groups.abs()[..., None] - unit[..., None] * magnitudes).abs().amin(-1)
    error = (read.transpose(1, 2).reshape(groups.shape) - groups).abs()
    assert torch.allclose(error, nearest, rtol=1e-6, atol=1e-7)
    assert error.any()


def test_values_that_a_group_has_stay_what_they_are() -> None:
    exact = torch.tensor([0.0, 0.5, -1, 1.5, -2, 3, -4, 6]).repeat(4) * 2.0**-9
    values = torch.stack([exact, exact * 2**20], dim=1)[None]
    assert torch.equal(decoded(values), values)


def test_a_group_of_zeros_stays_zero() -> None:
    assert not decoded(torch.zeros(1, 32, 2)).any()


def test_a_seeded_checkpoint_has_experts_in_mxfp4_and_the_rest_in_bfloat16(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    create_seeded_checkpoint(folder, 3, family="gpt_oss", dtype=torch.float4_e2m1fn_x2)
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    in_bytes = {name for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
    assert len(in_bytes) == 3 * 4
    assert all(name.endswith(("_proj_blocks", "_proj_scales")) for name in in_bytes)
    others = {tensor.dtype for name, tensor in tensors.items() if name not in in_bytes}
    assert others == {torch.bfloat16}
    spec = read_model_spec(folder)
    assert spec.raw["quantization_config"]["quant_method"] == "mxfp4"
    assert (spec.hidden_size, spec.moe_intermediate_size) == (64, 32), "whole groups"
    shape = (spec.num_experts, 32, 64)
    assert open_checkpoint(folder, {NAME: shape}).stored_dtype(NAME) == "MXFP4"


def test_the_same_values_are_quantised_as_are_written_plain(tmp_path: Path) -> None:
    read = {}
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    for dtype in (torch.float32, torch.float4_e2m1fn_x2):
        folder = tmp_path / str(dtype)
        create_seeded_checkpoint(folder, 3, family="gpt_oss", dtype=dtype, **sizes)
        read[dtype] = open_checkpoint(folder, {NAME: (6, 32, 64)}).read(NAME)
    plain, coded = read.values()
    assert 0 < np.linalg.norm(plain - coded) < 0.15 * np.linalg.norm(plain)


def test_a_family_that_is_not_published_so_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="qwen3_moe is in MXFP4"):
        create_seeded_checkpoint(tmp_path / "m", dtype=torch.float4_e2m1fn_x2)
