"""Every family's logits are those of transformers, from its own checkpoints: however the steps are
cut, on one rank and spread over four, before and after a death."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpu_worker.checkpoint.manifest import verify_folder, write_manifest
from gpu_worker.checkpoint.shards import read_tensors
from gpu_worker.cpu.registry import family_class
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS
from shared.errors import CheckpointError
from shared.model_spec import ARCHITECTURES, read_model_spec
from tests.unit.gpu_worker.cpu.reference import (
    VARIANTS,
    add_mtp_layer,
    quantise_fp8,
    quantise_mxfp4,
    random_tokens,
    reference_logits,
    save_checkpoint,
)
from tests.unit.gpu_worker.cpu.runs import (
    Chunk,
    adopt_without,
    make_batch,
    open_ranks,
    step_together,
)

TOLERANCE = 1e-4
SCATTERED = (9, 2, 17, 4, 30, 1, 11, 22, 5, 13, 40, 33)
"""A block table in no order."""

LENGTH = 40
CUTS = (0, 1, 7, 20, 23, *range(24, LENGTH + 1))


@pytest.fixture(scope="module", params=sorted(set(VARIANTS) - {"gpt_oss_wide"}))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def expected(folder: Path) -> NDArray[np.float32]:
    logits_TV = reference_logits(folder, random_tokens(LENGTH))
    assert logits_TV.std() > 1, "logits without spread would agree with anything"
    return logits_TV


def open_family(folder: Path) -> None:
    spec = read_model_spec(folder)
    family_class(spec.architecture)(spec)


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def test_prefill_at_once_and_in_chunks_and_decode_match(
    folder: Path, expected: NDArray[np.float32]
) -> None:
    tokens = random_tokens(LENGTH)
    (run,) = open_ranks(folder, 1)
    whole = run.logits(Chunk(tokens, 0, SCATTERED))
    assert difference(whole, expected) < TOLERANCE
    (run,) = open_ranks(folder, 1)
    parts = [run.logits(Chunk(tokens[a:b], a, SCATTERED)) for a, b in itertools.pairwise(CUTS)]
    assert np.array_equal(np.concatenate(parts), whole), "a cut changes no bit"


def test_four_ranks_match_before_and_after_a_death(
    folder: Path, expected: NDArray[np.float32]
) -> None:
    """Rank 3 dies in mid-stream; rank 0 goes on, rank 1 takes the stream of the dead one."""
    tokens = random_tokens(LENGTH)
    runs = open_ranks(folder, 4)
    cut = 25
    batch = make_batch([Chunk(tokens[:cut], 0, SCATTERED)])
    before = step_together(runs, [batch, make_batch([]), make_batch([]), batch])
    for rank in (0, 3):
        assert difference(before[rank].logits_RV, expected[:cut]) < TOLERANCE
    survivors = adopt_without(runs, 3)
    after = step_together(
        survivors,
        [
            make_batch([Chunk(tokens[cut:], cut, SCATTERED)]),
            make_batch([Chunk(tokens, 0, SCATTERED[::-1])]),
            make_batch([]),
        ],
    )
    assert difference(after[0].logits_RV, expected[cut:]) < TOLERANCE
    assert difference(after[1].logits_RV, expected) < TOLERANCE
    ours = np.concatenate([before[0].logits_RV, after[0].logits_RV])
    assert np.array_equal(ours, after[1].logits_RV), "a death changes no bit"


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "gpt_oss", "glm4_moe"])
def test_bf16_checkpoints_match_within_bf16_error(tmp_path: Path, family: str) -> None:
    """We compute in float32 on bf16 weights: closer to the exact result than the reference."""
    save_checkpoint(tmp_path, family, torch.bfloat16)
    tokens = random_tokens(LENGTH)
    (run,) = open_ranks(tmp_path, 1)
    ours = run.logits(Chunk(tokens, 0, SCATTERED))
    exact = reference_logits(tmp_path, tokens, torch.float32)
    assert difference(ours, exact) < TOLERANCE
    rounded = reference_logits(tmp_path, tokens, torch.bfloat16)
    assert np.abs(rounded - exact).mean() > 10 * np.abs(ours - exact).mean()


def test_every_family_is_covered_here() -> None:
    assert {family for family, _ in VARIANTS.values()} == set(ARCHITECTURES.values())
    for family, config in SEEDED_CONFIGS.items():
        assert ARCHITECTURES[config["architectures"][0]] == family


def test_a_dense_model_has_one_expert_that_weighs_nothing(tmp_path: Path) -> None:
    spec = read_model_spec(save_checkpoint(tmp_path, "qwen3"))
    assert spec.moe_layers == ()
    assert spec.num_moe_layers == spec.num_experts == spec.top_k == 1
    assert spec.moe_intermediate_size == 0


@pytest.mark.parametrize(
    ("family", "change", "complaint"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "normed weights"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "routing 'noaux_tc'"),
        ("deepseek_v2", {"mlp_bias": True}, "biases in MLPs"),
        ("deepseek_v3", {"topk_method": "greedy"}, "routing 'greedy'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scores by 'softmax'"),
        ("deepseek_v3", {"n_group": 5}, "of 5 groups"),
        ("deepseek_v3", {"n_group": 12}, "of 12 groups"),
        ("deepseek_v3", {"topk_group": 5}, "5 of 4 groups"),
        ("deepseek_v3", {"num_experts_per_tok": 7}, "7 experts from 2 of 4"),
        ("deepseek_v3", {"qk_rope_head_dim": 5}, "the rotated one even"),
        ("deepseek_v32", {"q_lora_rank": None}, "indexer's sizes"),
        ("deepseek_v32", {"index_topk": None}, "malformed"),
        ("glm4_moe", {"head_dim": 10}, "5 rotated elements"),
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_is_refused(
    tmp_path: Path, family: str, change: dict[str, object], complaint: str
) -> None:
    folder = save_checkpoint(tmp_path, family)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=complaint):
        open_family(folder)


def test_sparse_attention_is_dense_where_it_chooses_all(tmp_path: Path) -> None:
    """With a top-k beyond the context the two have the same bits."""
    folder = save_checkpoint(tmp_path, "deepseek_v32")
    config = (folder / "config.json").read_text()
    tokens = random_tokens(LENGTH)
    (folder / "config.json").write_text(config.replace('"index_topk": 8', '"index_topk": 64'))
    (sparse,) = open_ranks(folder, 1)
    chosen = sparse.logits(Chunk(tokens, 0, SCATTERED))
    dense_config = config.replace("DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM")
    (folder / "config.json").write_text(dense_config)
    (dense,) = open_ranks(folder, 1)
    assert np.array_equal(chosen, dense.logits(Chunk(tokens, 0, SCATTERED)))


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "glm4_moe"])
def test_layers_of_multi_token_prediction_are_ignored(tmp_path: Path, family: str) -> None:
    folder = save_checkpoint(tmp_path, family)
    chunk = Chunk(random_tokens(LENGTH), 0, SCATTERED)
    (run,) = open_ranks(folder, 1)
    without, num_tensors = run.logits(chunk), len(read_tensors(folder))
    add_mtp_layer(folder)
    write_manifest(folder)
    (run,) = open_ranks(folder, 1)
    assert np.array_equal(run.logits(chunk), without)
    assert verify_folder(folder) == len(read_tensors(folder)) > num_tensors + 6


def test_block_scaled_fp8_is_served_as_its_dequantised_weights(tmp_path: Path) -> None:
    """A V3 checkpoint as published: every matrix in e4m3 with a scale per block."""
    plain = save_checkpoint(tmp_path / "plain", "deepseek_v3")
    folder = quantise_fp8(plain, tmp_path / "fp8", block=(8, 16))
    tokens = random_tokens(LENGTH)
    (run,) = open_ranks(folder, 1)
    ours = run.logits(Chunk(tokens, 0, SCATTERED))
    assert difference(ours, reference_logits(plain, tokens)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp4_experts_are_served_as_their_dequantised_weights(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """A gpt-oss checkpoint as published: its experts in blocks of 32 with a common exponent, the
    rest in bf16."""
    plain = save_checkpoint(tmp_path / "plain", "gpt_oss_wide", dtype)
    folder = quantise_mxfp4(plain, tmp_path / "mxfp4")
    tokens = random_tokens(LENGTH)
    (run,) = open_ranks(folder, 1)
    assert run.model.weights_dtype == (np.float32 if dtype == torch.float32 else np.uint16)
    ours = run.logits(Chunk(tokens, 0, SCATTERED))
    assert difference(ours, reference_logits(plain, tokens)) < TOLERANCE
