"""A CUDA rank reads DeepSeek's shared weights from the checkpoint into the decoder's layout. Runs
on the CPU, without kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.checkpoint.checkpoint import open_checkpoint
from gpu_worker.cuda.weights.common_weights import check_tiles
from gpu_worker.cuda.weights.decoder_layout import DecoderLayout
from gpu_worker.cuda.weights.decoder_weights import (
    DecoderWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
)
from gpu_worker.cuda.weights.deepseek_weights import deepseek_layout
from gpu_worker.cuda.weights.staged_copy import StagedCopy
from gpu_worker.cuda.weights.weight_reader import WeightReader
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.errors import CheckpointError
from shared.model_spec import read_model_spec

HIDDEN, INNER, DENSE = 32, 16, 48
HEADS, PLAIN, ROTATED, VALUE, RANK, Q_RANK = 2, 32, 16, 48, 64, 80
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 304,
    "num_hidden_layers": 3,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "moe_intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": RANK,
    "q_lora_rank": Q_RANK,
    "qk_nope_head_dim": PLAIN,
    "qk_rope_head_dim": ROTATED,
    "v_head_dim": VALUE,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3; the first of three layers is dense. Read-only."""
    folder = tmp_path_factory.mktemp("checkpoints") / "v3"
    create_seeded_checkpoint(folder, family="deepseek_v3", **SIZES)
    return folder


@pytest.fixture(scope="module")
def v32_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sizes, with an indexer. Read-only."""
    folder = tmp_path_factory.mktemp("checkpoints") / "v32"
    indexer = {"index_n_heads": 3, "index_head_dim": 16, "index_topk": 64}
    create_seeded_checkpoint(folder, family="deepseek_v32", **(SIZES | indexer))
    return folder


def checkpoint_layout_of(folder: Path) -> DecoderLayout:
    spec = read_model_spec(folder)
    return deepseek_layout(
        spec,
        sigmoid=spec.architecture != "DeepseekV2ForCausalLM",
        has_indexer=spec.architecture == "DeepseekV32ForCausalLM",
    )


def read(folder: Path) -> DecoderWeights:
    layout = checkpoint_layout_of(folder)
    checkpoint = open_checkpoint(folder, layout.tensor_shapes())
    return layout.read(WeightReader(checkpoint, CPU, torch.float32, StagedCopy(CPU)))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_attention_takes_its_projections_apart_by_head(folder: Path) -> None:
    weights, tensors = read(folder), stored(folder)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}.self_attn"
        mla = layer.attention
        assert isinstance(mla, MlaWeights)
        assert mla.q_norm_M is not None
        assert mla.w_q_NM is not None
        latent_q, latent_kv = mla.w_in_CH.split([Q_RANK, RANK + ROTATED])
        assert torch.equal(latent_q, tensors[f"{prefix}.q_a_proj.weight"])
        assert torch.equal(latent_kv, tensors[f"{prefix}.kv_a_proj_with_mqa.weight"])
        assert torch.equal(mla.w_q_NM, tensors[f"{prefix}.q_b_proj.weight"])
        assert torch.equal(mla.q_norm_M, tensors[f"{prefix}.q_a_layernorm.weight"])
        assert torch.equal(mla.kv_norm_R, tensors[f"{prefix}.kv_a_layernorm.weight"])
        assert torch.equal(layer.w_o_HO, tensors[f"{prefix}.o_proj.weight"])
        latent_R = torch.randn(RANK, generator=torch.Generator().manual_seed(index))
        expanded = tensors[f"{prefix}.kv_b_proj.weight"] @ latent_R
        for head, part in enumerate(expanded.split(PLAIN + VALUE)):
            torch.testing.assert_close(mla.w_uk_ARF[head].T @ latent_R, part[:PLAIN])
            torch.testing.assert_close(mla.w_uv_AGR[head] @ latent_R, part[PLAIN:])
        assert mla.w_uk_ARF.is_contiguous()
        assert mla.w_uv_AGR.is_contiguous()


def test_the_first_layer_is_dense_others_have_a_router_and_shared_experts(folder: Path) -> None:
    weights, tensors = read(folder), stored(folder)
    dense = weights.layers[0].mlp
    assert isinstance(dense, MlpWeights)
    check_mlp(dense, tensors, "model.layers.0.mlp")
    for index in (1, 2):
        moe, prefix = weights.layers[index].mlp, f"model.layers.{index}.mlp"
        assert isinstance(moe, MoeWeights)
        assert moe.correction_E is not None
        assert moe.shared is not None
        assert torch.equal(moe.w_router_EH, tensors[f"{prefix}.gate.weight"])
        assert torch.equal(moe.correction_E, tensors[f"{prefix}.gate.e_score_correction_bias"])
        check_mlp(moe.shared, tensors, f"{prefix}.shared_experts")


def check_mlp(mlp: MlpWeights, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    gate, up = mlp.w_gate_up_JH.chunk(2)
    assert torch.equal(gate, tensors[f"{prefix}.gate_proj.weight"])
    assert torch.equal(up, tensors[f"{prefix}.up_proj.weight"])
    assert torch.equal(mlp.w_down_HI, tensors[f"{prefix}.down_proj.weight"])


def test_queries_without_a_latent_come_from_the_hidden_state(tmp_path: Path) -> None:
    folder = tmp_path / "lite"
    changes = {"q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": None}
    create_seeded_checkpoint(folder, family="deepseek_v2", **(SIZES | changes))
    layer, tensors = read(folder).layers[1], stored(folder)
    mla, moe = layer.attention, layer.mlp
    assert isinstance(mla, MlaWeights)
    assert isinstance(moe, MoeWeights)
    assert mla.q_norm_M is None
    assert mla.w_q_NM is None
    queries, _ = mla.w_in_CH.split([HEADS * (PLAIN + ROTATED), RANK + ROTATED])
    assert torch.equal(queries, tensors["model.layers.1.self_attn.q_proj.weight"])
    assert moe.correction_E is None
    assert moe.shared is None


def test_sizes_are_those_of_the_config(folder: Path) -> None:
    sizes = checkpoint_layout_of(folder).sizes
    assert (sizes.moe_layers, sizes.num_experts, sizes.top_k) == ((1, 2), 8, 3)
    assert (sizes.inner_size, sizes.shared_size, sizes.dense_size) == (INNER, 2 * INNER, DENSE)
    assert (sizes.routing.sigmoid, sizes.routing.num_groups, sizes.routing.topk_group) == (
        True,
        4,
        2,
    )
    assert sizes.heads_size == HEADS * VALUE


def test_an_indexer_takes_its_keys_and_weights_from_one_matrix(v32_folder: Path) -> None:
    weights, tensors = read(v32_folder), stored(v32_folder)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}.self_attn.indexer"
        mla = layer.attention
        assert isinstance(mla, MlaWeights)
        own = mla.indexer
        assert own is not None
        keys, head_weights = own.w_in_CH.split([16, 3])
        assert torch.equal(keys, tensors[f"{prefix}.wk.weight"])
        assert torch.equal(head_weights, tensors[f"{prefix}.weights_proj.weight"])
        assert torch.equal(own.w_q_NM, tensors[f"{prefix}.wq_b.weight"])
        assert torch.equal(own.k_norm_Z, tensors[f"{prefix}.k_norm.weight"])
        assert torch.equal(own.k_bias_Z, tensors[f"{prefix}.k_norm.bias"])
        assert (own.k_norm_Z.dtype, own.k_bias_Z.dtype) == (torch.float32, torch.float32)


def test_other_models_have_no_indexer(folder: Path) -> None:
    for layer in read(folder).layers:
        assert isinstance(layer.attention, MlaWeights)
        assert layer.attention.indexer is None


def test_heads_of_an_indexer_that_no_block_holds_are_refused(
    v32_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((v32_folder / "config.json").read_text()) | {"index_head_dim": 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"an indexer's heads of 24.*--device cpu"):
        check_tiles(checkpoint_layout_of(tmp_path).sizes)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attention_bias": True}, "biases in attention"),
        ({"kv_lora_rank": 48}, "kv_lora_rank of 48, no power of two"),
        ({"qk_rope_head_dim": 8}, "rotated heads of 8, no power of two from 16"),
        ({"v_head_dim": 24}, "values of 24, no multiple of 16"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_with_what_to_do(
    folder: Path, tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        check_tiles(checkpoint_layout_of(tmp_path).sizes)
    assert complaint in str(caught.value)
    assert "--device cpu" in str(caught.value)
