"""What a step reads according to the sizes is what the weights hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gpu_worker.checkpoint.gqa_shape import (
    QK_NORM_HEAD,
    QK_NORM_NONE,
    QK_NORM_WHOLE,
    GqaShape,
)
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.checkpoint.rope import Rope
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes, Routing
from gpu_worker.cuda.weights.decoder_weights import (
    GqaWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
)
from gpu_worker.cuda.weights.random_weights import random_weights

MLA = MlaShape(
    hidden_size=32,
    num_heads=3,
    qk_nope_head_dim=5,
    qk_rope_head_dim=4,
    v_head_dim=7,
    rank=16,
    q_lora_rank=11,
    interleaved=True,
)
QWEN = DecoderSizes(
    num_layers=3,
    hidden_size=32,
    vocab_size=50,
    attention=GqaShape(num_heads=6, num_kv_heads=2, head_dim=8, qk_norm=QK_NORM_HEAD),
    rope=Rope(theta=1e4, kind="default", scaling={}, context_tokens_max=64),
    moe_layers=(0, 1, 2),
    num_experts=4,
    top_k=2,
    inner_size=9,
)
V3 = replace(
    QWEN,
    attention=MLA,
    moe_layers=(1, 2),
    routing=Routing(sigmoid=True),
    shared_size=13,
    dense_size=17,
)
V32 = replace(V3, attention=replace(MLA, num_index_heads=5, index_head_dim=6, index_top_k=8))
V2_LITE = replace(V3, attention=replace(MLA, q_lora_rank=0), routing=Routing(normalise=False))
DENSE = replace(
    QWEN, moe_layers=(), num_experts=1, top_k=1, inner_size=0, dense_size=17, windows=(5, 0, 5)
)
MODELS = {"Qwen3": QWEN, "V3": V3, "V3.2": V32, "V2-Lite": V2_LITE, "dense": DENSE}


@pytest.mark.parametrize("sizes", MODELS.values(), ids=list(MODELS))
def test_shared_values_count_every_matrix_but_the_embedding(sizes: DecoderSizes) -> None:
    weights = random_weights(sizes, torch.device("cpu"), torch.float32)
    matrices = [weights.w_head_VH]
    for layer in weights.layers:
        matrices += [layer.w_o_HO, *matrices_of(layer.attention), *matrices_of(layer.mlp)]
        if isinstance(layer.attention, MlaWeights) and layer.attention.indexer is not None:
            matrices += matrices_of(layer.attention.indexer)
        if isinstance(layer.mlp, MoeWeights) and layer.mlp.shared is not None:
            matrices += matrices_of(layer.mlp.shared)
    assert sum(matrix.numel() for matrix in matrices) == sizes.num_shared_weights


def matrices_of(part: object) -> list[Tensor]:
    names = [name for name in type(part).__dataclass_fields__ if name.startswith("w_")]  # type: ignore[attr-defined]
    return [value for name in names if (value := getattr(part, name)) is not None]


def test_layers_have_the_half_that_the_sizes_say() -> None:
    layers = random_weights(V3, torch.device("cpu"), torch.float32).layers
    kinds = [type(layer.mlp) for layer in layers]
    assert kinds == [MlpWeights, MoeWeights, MoeWeights]
    assert all(isinstance(layer.attention, MlaWeights) for layer in layers)
    assert V3.num_moe_layers == 2


def test_a_dense_model_has_one_layer_of_slots_as_placement_counts_them() -> None:
    assert (DENSE.num_moe_layers, DENSE.num_slot_layers) == (0, 1)
    assert V3.num_slot_layers == 2


def test_each_layer_has_its_window_or_all_have_that_of_the_shape() -> None:
    assert [DENSE.window_of(layer) for layer in range(3)] == [5, 0, 5]
    assert isinstance(QWEN.attention, GqaShape)
    windowed = replace(QWEN, attention=replace(QWEN.attention, window=7))
    assert [windowed.window_of(layer) for layer in range(3)] == [7, 7, 7]
    assert V3.window_of(1) == 0


@pytest.mark.parametrize("qk_norm", [QK_NORM_NONE, QK_NORM_HEAD, QK_NORM_WHOLE])
def test_random_weights_have_the_norms_and_biases_that_are_asked_for(qk_norm: int) -> None:
    assert isinstance(QWEN.attention, GqaShape)
    sizes = replace(QWEN, attention=replace(QWEN.attention, qk_norm=qk_norm))
    layer = random_weights(sizes, torch.device("cpu"), torch.float32, biased=True).layers[0]
    assert isinstance(layer.attention, GqaWeights)
    assert isinstance(layer.mlp, MoeWeights)
    norms = [layer.attention.q_norm, layer.attention.k_norm]
    wanted = {QK_NORM_NONE: [None] * 2, QK_NORM_HEAD: [(8,)] * 2, QK_NORM_WHOLE: [(48,), (16,)]}
    assert [None if norm is None else norm.shape for norm in norms] == wanted[qk_norm]
    biases = (layer.attention.b_qkv_C, layer.output_bias, layer.mlp.b_router_E)
    assert [None if bias is None else bias.shape for bias in biases] == [(80,), (32,), (4,)]
    plain = random_weights(sizes, torch.device("cpu"), torch.float32).layers[0]
    assert plain.output_bias is None


def test_a_token_is_cached_as_one_latent_and_one_shared_key_and_the_indexers() -> None:
    assert V32.kv_values_per_token == 3 * (16 + 4 + 6)
    assert V3.kv_values_per_token == 3 * (16 + 4)
    assert QWEN.kv_values_per_token == 3 * 2 * 2 * 8


def test_a_narrow_cache_leaves_rotated_keys_and_the_indexers_wide() -> None:
    assert QWEN.kv_bytes_per_token(2, 2) == 2 * QWEN.kv_values_per_token
    assert QWEN.kv_bytes_per_token(2, 1) == QWEN.kv_values_per_token
    assert V32.kv_bytes_per_token(2, 2) == 2 * V32.kv_values_per_token
    assert V32.kv_bytes_per_token(2, 1) == 3 * (16 + 2 * (4 + 6))
