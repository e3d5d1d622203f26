"""The model's logits are those of transformers' Qwen3MoeForCausalLM, however its steps are cut and
wherever its experts are."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import Qwen3MoeForCausalLM

from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from tests.unit.gpu_worker.cpu.runs import (
    SMALL,
    Chunk,
    RankRun,
    make_batch,
    open_ranks,
    step_together,
)

TOLERANCE = 1e-4
SCATTERED = (9, 2, 17, 4, 30, 1, 11, 22, 5, 13, 40, 33)
"""A block table in no order."""


def reference(folder: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Its grouped matrix products want rows of 16 bytes; the plain loop takes any size."""
    model = Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    return np.asarray(logits.numpy())


def random_tokens(count: int, vocab_size: int = SMALL["vocab_size"]) -> NDArray[np.int32]:
    return np.random.default_rng(count).integers(0, vocab_size, count).astype(np.int32)


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > 1, "logits without spread would agree with anything"
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"mlp_only_layers": (0, 2)},
        {"norm_topk_prob": False},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 36},
    ],
    ids=str,
)
def test_prefill_logits_match_transformers(tmp_path: Path, variant: dict[str, object]) -> None:
    create_seeded_checkpoint(tmp_path / "m", seed=3, **(SMALL | variant))
    tokens = random_tokens(45)
    (run,) = open_ranks(tmp_path / "m", 1)
    ours = run.logits(Chunk(tokens, 0, SCATTERED))
    assert difference(ours, reference(tmp_path / "m", tokens)) < TOLERANCE


def test_chunked_prefill_then_decode_matches_transformers(small_checkpoint: Path) -> None:
    tokens = random_tokens(40)
    (run,) = open_ranks(small_checkpoint, 1)
    cuts = [0, 1, 7, 20, 23, *range(24, 41)]
    parts = [run.logits(Chunk(tokens[a:b], a, SCATTERED)) for a, b in itertools.pairwise(cuts)]
    assert difference(np.concatenate(parts), reference(small_checkpoint, tokens)) < TOLERANCE


def test_experts_on_four_ranks_match_transformers(small_checkpoint: Path) -> None:
    """Every rank has tokens of its own, one has none in the last step."""
    runs = open_ranks(small_checkpoint, 4)
    streams = [random_tokens(n) for n in (30, 31, 32, 17)]
    first = step_together(runs, [make_batch([Chunk(s[:17], 0, SCATTERED)]) for s in streams])
    chunks = [[Chunk(s[17:], 17, SCATTERED)] if len(s) > 17 else [] for s in streams]
    second = step_together(runs, [make_batch(c) for c in chunks])
    for tokens, a, b in zip(streams, first, second, strict=True):
        ours = np.concatenate([a.logits_RV, b.logits_RV])
        assert difference(ours, reference(small_checkpoint, tokens)) < TOLERANCE
        assert a.any_work
        assert b.any_work


@pytest.mark.slow
def test_the_default_model_matches_transformers_over_four_ranks(tmp_path: Path) -> None:
    create_seeded_checkpoint(tmp_path / "m")
    tokens = random_tokens(150, vocab_size=4096)
    runs = open_ranks(tmp_path / "m", 4, kv_blocks=12, block_tokens=16)
    table = list(range(12))
    parts = []
    for a, b in ((0, 64), (64, 128), *((n, n + 1) for n in range(128, 150))):
        batches = [make_batch([Chunk(tokens[a:b], a, table)])] + [make_batch([])] * 3
        parts.append(step_together(runs, batches)[0].logits_RV)
    assert difference(np.concatenate(parts), reference(tmp_path / "m", tokens)) < TOLERANCE


def test_a_step_without_tokens_anywhere_ends_after_the_first_dispatch(
    small_checkpoint: Path,
) -> None:
    (run,) = open_ranks(small_checkpoint, 1)
    dispatched: list[int] = []

    class Counting:
        def dispatch(self, layer, x_TH, experts_TK):
            dispatched.append(layer)
            return run.exchange.dispatch(layer, x_TH, experts_TK)

    run.exchange.begin_step(1, 0, num_tokens=0, has_work=False)
    forward = run.model.forward(make_batch([]), Counting())
    assert dispatched == [0]
    assert not forward.any_work
    assert forward.logits_RV.shape == (0, SMALL["vocab_size"])


def test_only_the_wanted_rows_get_logits(small_checkpoint: Path) -> None:
    (run,) = open_ranks(small_checkpoint, 1)
    chunks = [Chunk(random_tokens(5), 0, (0, 1)), Chunk(random_tokens(3), 0, (2,))]
    every = run.step(make_batch(chunks)).logits_RV
    wanted = run.step(make_batch(chunks, all_rows=False)).logits_RV
    assert np.array_equal(wanted, every[[4, 7]])


def test_logits_outlive_the_next_step(small_checkpoint: Path) -> None:
    run: RankRun
    (run,) = open_ranks(small_checkpoint, 1)
    first = run.logits(Chunk([1, 2, 3], 0, (0,)))
    kept = first.copy()
    run.logits(Chunk([4, 5, 6], 0, (0,)))
    assert np.array_equal(first, kept)


def test_a_position_beyond_the_context_is_refused(small_checkpoint: Path) -> None:
    (run,) = open_ranks(small_checkpoint, 1, kv_blocks=3)
    assert run.model.context_tokens_max == 12
    with pytest.raises(AssertionError, match="context"):
        run.logits(Chunk([1], 12, (0, 1, 2, 0)))
