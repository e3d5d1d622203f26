"""What a step reads according to the sizes is what the weights hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, GqaShape
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.checkpoint.rope import Rope
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes, Routing
from gpu_worker.cuda.weights.decoder_weights import MlaWeights, MlpWeights, MoeWeights
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


@pytest.mark.parametrize("sizes", [QWEN, V3, V32, V2_LITE], ids=["Qwen3", "V3", "V3.2", "V2-Lite"])
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


def test_a_token_is_cached_as_one_latent_and_one_shared_key_and_the_indexers() -> None:
    assert V32.kv_values_per_token == 3 * (16 + 4 + 6)
    assert V3.kv_values_per_token == 3 * (16 + 4)
    assert QWEN.kv_values_per_token == 3 * 2 * 2 * 8
