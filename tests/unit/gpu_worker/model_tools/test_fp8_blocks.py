"""Checkpoints in block-scaled FP8 that are made here are such as DeepSeek publishes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.checkpoint.checkpoint import open_checkpoint
from gpu_worker.model_tools import fp8_blocks
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.model_spec import read_model_spec
from tests.unit.gpu_worker.cpu.runs import SMALL


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (16, 48)])
def test_every_value_is_within_half_a_step_of_what_is_stored(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, scales = fp8_blocks.quantise(values)
    assert scales.shape == fp8_blocks.scales_shape(shape)
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    error = (codes.float() * spread - values).abs()
    assert (error <= values.abs() / 16 + spread * 2.0**-10).all()
    assert codes.float().abs().max() == 448


def test_a_block_of_zeros_stays_zero() -> None:
    codes, scales = fp8_blocks.quantise(torch.zeros(130, 20))
    assert not codes.float().any()
    assert (scales > 0).all()


def test_a_seeded_checkpoint_has_projections_in_fp8_and_the_rest_in_bfloat16(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "m"
    create_seeded_checkpoint(folder, 3, dtype=torch.float8_e4m3fn, **SMALL)
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    by_dtype = {
        dtype: {name for name, tensor in tensors.items() if tensor.dtype == dtype}
        for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
    }
    in_fp8 = by_dtype[torch.float8_e4m3fn]
    assert all("_proj.weight" in name for name in in_fp8)
    assert by_dtype[torch.float32] == {f"{name}_scale_inv" for name in in_fp8}
    assert "model.embed_tokens.weight" in by_dtype[torch.bfloat16]
    assert "model.layers.0.mlp.gate.weight" in by_dtype[torch.bfloat16]
    raw = read_model_spec(folder).raw
    assert raw["quantization_config"]["weight_block_size"] == [128, 128]
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    shape = tuple(tensors[name].shape)
    assert open_checkpoint(folder, {name: shape}).fp8_block(name) == (128, 128)


def test_the_same_values_are_quantised_as_are_written_plain(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    read = {}
    for dtype in (torch.float32, torch.float8_e4m3fn):
        folder = tmp_path / str(dtype)
        create_seeded_checkpoint(folder, 3, dtype=dtype, **SMALL)
        shape = (SMALL["hidden_size"], SMALL["num_attention_heads"] * SMALL["head_dim"])
        read[dtype] = torch.from_numpy(open_checkpoint(folder, {name: shape}).read(name))
    plain, coded = read.values()
    assert 0 < (plain - coded).norm() < 0.04 * plain.norm()
