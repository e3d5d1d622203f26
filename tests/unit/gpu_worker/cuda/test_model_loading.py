"""A CUDA rank loads the shared weights of the checkpoint in the decoder's layout, and needs neither
numba nor Triton for that. Runs on the CPU, without kernels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.checkpoint.gqa_shape import GqaShape
from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.checkpoint.manifest import write_manifest
from gpu_worker.cuda.model_loading import CudaModel, load_cuda_model
from gpu_worker.cuda.weights.decoder_weights import GqaWeights, MlpWeights, MoeWeights
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.errors import CheckpointError
from shared.model_spec import read_model_spec
from tests.support.fake_clock import FakeClock
from tests.unit.gpu_worker.cpu.reference import quantise_fp8
from tests.unit.gpu_worker.cuda.experts.expert_folder import damage

SIZES = {
    "vocab_size": 304,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}

LOAD_WITHOUT_NUMBA = """
import sys
from pathlib import Path

for name in ("numba", "llvmlite", "triton"):
    sys.modules[name] = None  # its import raises
import torch
from gpu_worker.cuda.model_loading import load_cuda_model
from gpu_worker.checkpoint.load_progress import LoadProgress
from shared.clock import SystemClock
from shared.model_spec import read_model_spec
import numpy as np

folder = Path(sys.argv[1])
model = load_cuda_model(
    folder, read_model_spec(folder), slots_per_rank=4,
    device=torch.device("cpu"), dtype=torch.bfloat16,
    progress=LoadProgress(SystemClock()),
)
held = model.loader.load(np.tile(np.arange(4, dtype=np.int16), (model.sizes.num_moe_layers, 1)))
print("held", held.tolist())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, the middle one dense. Read-only."""
    folder = tmp_path_factory.mktemp("checkpoints") / "qwen3_moe"
    create_seeded_checkpoint(folder, seed=7, mlp_only_layers=(1,), **SIZES)
    return folder


def load(folder: Path) -> CudaModel:
    return load_cuda_model(
        folder,
        read_model_spec(folder),
        slots_per_rank=5,
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=LoadProgress(FakeClock()),
    )


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_shared_weights_lie_as_the_decoder_wants_them(folder: Path) -> None:
    weights, tensors = load(folder).weights, stored(folder)
    assert torch.equal(weights.embedding_VH, tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.final_norm_H, tensors["model.norm.weight"])
    assert torch.equal(weights.w_head_VH, tensors["lm_head.weight"])
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        attention = layer.attention
        assert isinstance(attention, GqaWeights)
        q, k, v = attention.w_qkv_CH.split([64, 32, 32])
        assert torch.equal(q, tensors[f"{prefix}.self_attn.q_proj.weight"])
        assert torch.equal(k, tensors[f"{prefix}.self_attn.k_proj.weight"])
        assert torch.equal(v, tensors[f"{prefix}.self_attn.v_proj.weight"])
        assert torch.equal(attention.q_norm, tensors[f"{prefix}.self_attn.q_norm.weight"])
        assert torch.equal(attention.k_norm, tensors[f"{prefix}.self_attn.k_norm.weight"])
        assert torch.equal(layer.w_o_HO, tensors[f"{prefix}.self_attn.o_proj.weight"])
        assert torch.equal(layer.input_norm_H, tensors[f"{prefix}.input_layernorm.weight"])
        assert torch.equal(layer.mlp_norm_H, tensors[f"{prefix}.post_attention_layernorm.weight"])
    sparse, dense = weights.layers[2].mlp, weights.layers[1].mlp
    assert isinstance(sparse, MoeWeights)
    assert torch.equal(sparse.w_router_EH, tensors["model.layers.2.mlp.gate.weight"])
    assert isinstance(dense, MlpWeights)
    gate, up = dense.w_gate_up_JH.chunk(2)
    assert torch.equal(gate, tensors["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(up, tensors["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(dense.w_down_HI, tensors["model.layers.1.mlp.down_proj.weight"])


def test_sizes_are_those_of_the_config(folder: Path) -> None:
    sizes = load(folder).sizes
    assert isinstance(sizes.attention, GqaShape)
    assert (sizes.attention.num_heads, sizes.attention.num_kv_heads, sizes.attention.head_dim) == (
        (4, 2, 16)
    )
    assert (sizes.moe_layers, sizes.num_experts, sizes.top_k) == ((0, 2), 4, 2)
    assert (sizes.hidden_size, sizes.inner_size, sizes.dense_size) == (32, 16, 48)
    assert (sizes.rope.theta, sizes.routing.normalise, sizes.routing.sigmoid) == (1e4, True, False)


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    create_seeded_checkpoint(folder, tie_word_embeddings=True, **SIZES)
    weights = load(folder).weights
    assert weights.w_head_VH is weights.embedding_VH


def test_experts_of_the_layers_that_have_them_reach_slots(folder: Path) -> None:
    model, tensors = load(folder), stored(folder)
    wanted = model.slots.contents
    wanted[1, 3] = 2
    model.loader.load(wanted)
    prefix = "model.layers.2.mlp.experts.2"  # the second layer that has experts
    gate, up = model.slots.w_gate_up_LSJH[1, 3].chunk(2)
    assert torch.equal(gate, tensors[f"{prefix}.gate_proj.weight"])
    assert torch.equal(up, tensors[f"{prefix}.up_proj.weight"])
    assert torch.equal(model.slots.w_down_LSHI[1, 3], tensors[f"{prefix}.down_proj.weight"])


def test_block_scaled_fp8_becomes_what_it_stands_for(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    create_seeded_checkpoint(plain, num_shards=1, **SIZES)
    coded = quantise_fp8(plain, tmp_path / "coded", block=(16, 8))
    expected, ours = load(plain), load(coded)
    experts = np.tile(np.arange(5, dtype=np.int16) % 4, (3, 1))
    for model in (expected, ours):
        model.loader.load(experts)
    assert torch.equal(ours.slots.w_gate_up_LSJH, expected.slots.w_gate_up_LSJH)
    assert torch.equal(ours.slots.w_down_LSHI, expected.slots.w_down_LSHI)
    for layer, exact in zip(ours.weights.layers, expected.weights.layers, strict=True):
        assert torch.equal(layer.w_o_HO, exact.w_o_HO)


def test_a_damaged_shared_weight_is_refused_by_name(tmp_path: Path) -> None:
    folder, name = tmp_path / "damaged", "model.layers.1.self_attn.k_proj.weight"
    create_seeded_checkpoint(folder, num_shards=1, **SIZES)
    write_manifest(folder)
    damage(folder, name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(folder)


def test_neither_numba_nor_triton_is_needed(folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_NUMBA, str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert "held [[0, 1, 2, 3], [0, 1, 2, 3]]" in ended.stdout
