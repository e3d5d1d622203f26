"""Experts that a layer stores together reach slots as the kernels want them: gate and up apart,
outputs as rows, biases behind. Those in MXFP4: test_mxfp4_experts. Runs on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.cuda.model_loading import CudaModel, load_cuda_model
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.model_spec import read_model_spec
from tests.support.fake_clock import FakeClock

HIDDEN, INNER, EXPERTS = 64, 32, 4
SIZES = {
    "vocab_size": 304,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_local_experts": EXPERTS,
    "head_dim": 16,
}
HELD = np.array([[3, 1, 0, 2], [2, 2, 3, 1]], dtype=np.int16)


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    create_seeded_checkpoint(folder, 3, family="gpt_oss", dtype=dtype, num_shards=1, **SIZES)
    return folder


def loaded(folder: Path, dtype: torch.dtype) -> CudaModel:
    model = load_cuda_model(
        folder,
        read_model_spec(folder),
        slots_per_rank=EXPERTS,
        device=torch.device("cpu"),
        dtype=dtype,
        progress=LoadProgress(FakeClock()),
    )
    assert np.array_equal(model.loader.load(HELD), HELD)
    return model


def check(model: CudaModel, folder: Path, dtype: torch.dtype) -> None:
    tensors, slots = load_file(folder / "model.safetensors"), model.slots
    assert slots.b_gate_up_LSJ is not None
    assert slots.b_down_LSH is not None
    for layer, slot in np.ndindex(HELD.shape):
        prefix, expert = f"model.layers.{layer}.mlp.experts", HELD[layer, slot]

        def of(name: str, prefix: str = prefix, expert: int = expert) -> torch.Tensor:
            return tensors[f"{prefix}.{name}"][expert].to(dtype)

        gate, up = slots.w_gate_up_LSJH[layer, slot].chunk(2)
        assert torch.equal(gate, of("gate_up_proj")[:, ::2].T)
        assert torch.equal(up, of("gate_up_proj")[:, 1::2].T)
        assert torch.equal(slots.w_down_LSHI[layer, slot], of("down_proj").T)
        b_gate, b_up = slots.b_gate_up_LSJ[layer, slot].chunk(2)
        assert torch.equal(b_gate, of("gate_up_proj_bias")[::2])
        assert torch.equal(b_up, of("gate_up_proj_bias")[1::2])
        assert torch.equal(slots.b_down_LSH[layer, slot], of("down_proj_bias"))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_hold_what_is_stored(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    folder = saved(tmp_path / "plain", stored)
    check(loaded(folder, dtype), folder, dtype)


def test_biases_and_sinks_of_attention_and_routers_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    for index, layer in enumerate(loaded(folder, torch.float32).weights.layers):
        prefix = f"model.layers.{index}"
        biases = [tensors[f"{prefix}.self_attn.{n}_proj.bias"] for n in "qkv"]
        assert torch.equal(layer.attention.b_qkv_C, torch.cat(biases))
        assert torch.equal(layer.attention.sinks_Q, tensors[f"{prefix}.self_attn.sinks"])
        assert torch.equal(layer.output_bias, tensors[f"{prefix}.self_attn.o_proj.bias"])
        assert torch.equal(layer.mlp.b_router_E, tensors[f"{prefix}.mlp.router.bias"])


def test_sizes_say_what_the_layers_see(tmp_path: Path) -> None:
    sizes = loaded(saved(tmp_path / "plain"), torch.float32).sizes
    assert [sizes.window_of(layer) for layer in range(2)] == [7, 0]
    assert sizes.clamped_experts
    assert sizes.rope.kind == "yarn"
