"""Quantised tensors are found under the name that the model has for them, read whole or in parts,
and refused by name where their files do not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from gpu_worker.checkpoint.checkpoint import SINGLE_FILE, Checkpoint, open_checkpoint
from shared.errors import CheckpointError

FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
N, K = 200, 300  # no multiples of the block
E, H, J = 3, 64, 6


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def fp8_parts() -> dict[str, torch.Tensor]:
    return {
        "w.weight": torch.randn(N, K, generator=generator()).to(torch.float8_e4m3fn),
        "w.weight_scale_inv": torch.rand(2, 3, generator=generator()),
    }


def mxfp4_parts() -> dict[str, torch.Tensor]:
    def random(*shape: int, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator())

    return {
        "experts.gate_up_proj_blocks": random(E, J, H // 32, 16, low=0, high=256),
        "experts.gate_up_proj_scales": random(E, J, H // 32, low=110, high=130),
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], quantisation: Any = None) -> None:
    safetensors.torch.save_file(tensors, folder / SINGLE_FILE)
    config = {} if quantisation is None else {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))


def open_fp8(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, {"w.weight": (N, K)})


def open_mxfp4(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, {"experts.gate_up_proj": (E, H, J)})


def test_block_scaled_fp8_is_read_as_one_tensor(tmp_path: Path) -> None:
    parts = fp8_parts()
    write(tmp_path, parts, FP8_CONFIG)
    checkpoint = open_fp8(tmp_path)
    scales = parts["w.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    expected = parts["w.weight"].float() * scales[:N, :K]
    assert np.array_equal(checkpoint.read("w.weight"), expected.numpy())
    assert checkpoint.stored_dtype("w.weight") == "F8_E4M3"
    assert checkpoint.shape("w.weight") == (N, K)
    assert checkpoint.has("w.weight")
    assert not checkpoint.has("w.weight_scale_inv")


def test_mxfp4_is_read_in_the_layout_of_transformers_whole_and_in_parts(tmp_path: Path) -> None:
    parts = mxfp4_parts()
    write(tmp_path, parts, {"quant_method": "mxfp4"})
    checkpoint = open_mxfp4(tmp_path)
    expected = convert_moe_packed_tensors(*parts.values(), dtype=torch.float32).numpy()
    read = checkpoint.read("experts.gate_up_proj")
    assert read.shape == expected.shape == checkpoint.shape("experts.gate_up_proj") == (E, H, J)
    assert np.array_equal(read, expected)
    for expert in range(E):
        part = checkpoint.read_part("experts.gate_up_proj", expert)
        assert np.array_equal(part, expected[expert])
        short = checkpoint.read_bits_part("experts.gate_up_proj", expert)
        assert np.array_equal(short.astype(np.uint32) << 16, part.view(np.uint32))
    assert checkpoint.stored_dtype("experts.gate_up_proj") == "MXFP4"


def test_parts_of_plain_tensors_are_read_alone(tmp_path: Path) -> None:
    whole = torch.randn(4, 3, 5, generator=generator()).bfloat16()
    write(tmp_path, {"w": whole})
    checkpoint = open_checkpoint(tmp_path, {"w": (4, 3, 5)})
    assert np.array_equal(checkpoint.read_part("w", 2), whole[2].float().numpy())
    bits = whole.view(torch.uint16).numpy()
    assert np.array_equal(checkpoint.read_bits("w"), bits)
    assert np.array_equal(checkpoint.read_bits_part("w", 3), bits[3])


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("matrix", "router", "expert_biases", "correction", "is_bfloat16"),
    [
        (BF16, BF16, BF16, BF16, True),
        (BF16, BF16, BF16, F32, True),
        (BF16, BF16, F32, F32, True),
        (BF16, F32, BF16, F32, True),
        (F32, BF16, BF16, BF16, False),
        (torch.float16, BF16, BF16, BF16, False),
    ],
    ids=str,
)
def test_large_matrices_alone_decide_whether_weights_are_kept_in_bfloat16(
    tmp_path: Path,
    matrix: torch.dtype,
    router: torch.dtype,
    expert_biases: torch.dtype,
    correction: torch.dtype,
    is_bfloat16: bool,
) -> None:
    tensors = {
        "embed_tokens.weight": torch.ones(4, 6, dtype=BF16),
        "gate_proj.weight": torch.ones(4, 6, dtype=matrix),
        "mlp.gate.weight": torch.ones(3, 6, dtype=router),
        "experts.down_proj_bias": torch.ones(3, 6, dtype=expert_biases),
        "gate.e_score_correction_bias": torch.full((3,), 1 / 3, dtype=correction),
    }
    mxfp4 = mxfp4_parts()
    write(tmp_path, tensors | mxfp4)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    checkpoint = open_checkpoint(tmp_path, shapes | {"experts.gate_up_proj": (E, H, J)})
    assert checkpoint.is_bfloat16 == is_bfloat16
    read = checkpoint.read("gate.e_score_correction_bias")
    assert np.array_equal(read, tensors["gate.e_score_correction_bias"].float().numpy())


def test_what_is_read_is_the_callers_own(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.ones(2, 3)})
    checkpoint = open_checkpoint(tmp_path, {"w": (2, 3)})
    checkpoint.read("w")[:] = 7
    assert (checkpoint.read("w") == 1).all()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_other_quantisations_are_refused_by_name(tmp_path: Path, method: str) -> None:
    write(tmp_path, {"w.weight": torch.zeros(N, K)}, {"quant_method": method})
    with pytest.raises(CheckpointError, match=f"quant_method '{method}'"):
        open_fp8(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"quant_method": "fp8"},
        FP8_CONFIG | {"weight_block_size": [128]},
        FP8_CONFIG | {"weight_block_size": [0, 128]},
        FP8_CONFIG | {"weight_block_size": "128"},
    ],
    ids=str,
)
def test_fp8_without_a_block_size_is_refused(tmp_path: Path, config: Any) -> None:
    write(tmp_path, fp8_parts(), config)
    with pytest.raises(CheckpointError, match=r"w\.weight is FP8, but .*weight_block_size"):
        open_fp8(tmp_path)


def test_e5m2_is_refused(tmp_path: Path) -> None:
    parts = fp8_parts()
    parts["w.weight"] = torch.zeros(N, K).to(torch.float8_e5m2)
    write(tmp_path, parts, FP8_CONFIG)
    with pytest.raises(CheckpointError, match=r"w\.weight is stored as F8_E5M2; convert"):
        open_fp8(tmp_path)


@pytest.mark.parametrize(
    ("scales", "complaint"),
    [
        (None, "scales w.weight_scale_inv are missing"),
        (torch.ones(2, 2), r"w.weight_scale_inv has shape \[2, 2\]"),
        (torch.ones(2, 3, dtype=torch.int32), "w.weight_scale_inv is stored as I32"),
    ],
    ids=str,
)
def test_fp8_scales_that_do_not_fit_are_named(
    tmp_path: Path, scales: torch.Tensor | None, complaint: str
) -> None:
    parts = fp8_parts()
    del parts["w.weight_scale_inv"]
    write(tmp_path, parts if scales is None else parts | {"w.weight_scale_inv": scales}, FP8_CONFIG)
    with pytest.raises(CheckpointError, match=complaint):
        open_fp8(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("scales", None, "scales experts.gate_up_proj_scales are missing"),
        ("scales", torch.zeros(E, J, 1, dtype=torch.uint8), "proj_scales has shape"),
        ("blocks", torch.zeros(E, J, 2, 8, dtype=torch.uint8), "proj_blocks has shape"),
        ("blocks", torch.zeros(E, J, 2, 16), "proj_blocks is stored as F32"),
    ],
    ids=str,
)
def test_mxfp4_parts_that_do_not_fit_are_named(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, complaint: str
) -> None:
    parts = mxfp4_parts()
    del parts[f"experts.gate_up_proj_{name}"]
    if tensor is not None:
        parts[f"experts.gate_up_proj_{name}"] = tensor
    write(tmp_path, parts)
    with pytest.raises(CheckpointError, match=complaint):
        open_mxfp4(tmp_path)


def test_a_nan_in_the_weights_is_damage_and_named_when_read(tmp_path: Path) -> None:
    parts = fp8_parts()
    parts["w.weight"].view(torch.uint8)[7, 7] = 0xFF
    write(tmp_path, parts, FP8_CONFIG)
    checkpoint = open_fp8(tmp_path)
    with pytest.raises(CheckpointError, match=r"w\.weight holds NaN: it is damaged"):
        checkpoint.read("w.weight")
