"""One process scores tokens as transformers does; without a rank's experts it scores others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from gpu_worker.model_tools.__main__ import main
from gpu_worker.model_tools.scoring import LocalScorer, experts_of_rank
from tests.unit.gpu_worker.cpu.runs import SMALL

TOKENS = np.random.default_rng(5).integers(0, SMALL["vocab_size"], 60).tolist()


def reference_nats(folder: Path, tokens: list[int]) -> float:
    model = Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
    return -float(logprobs.gather(1, ids[0, 1:, None]).sum())


def test_the_score_is_that_of_transformers(small_checkpoint: Path) -> None:
    ours = LocalScorer(small_checkpoint).nats(TOKENS)
    assert ours == pytest.approx(reference_nats(small_checkpoint, TOKENS), abs=1e-2)


def test_the_first_token_is_not_scored(small_checkpoint: Path) -> None:
    assert LocalScorer(small_checkpoint).nats(TOKENS[:1]) == 0.0


def test_missing_experts_change_the_score_and_missing_none_does_not(
    small_checkpoint: Path,
) -> None:
    whole = LocalScorer(small_checkpoint).nats(TOKENS)
    assert LocalScorer(small_checkpoint, missing=()).nats(TOKENS) == whole
    assert LocalScorer(small_checkpoint, missing=(2, 3)).nats(TOKENS) != whole


def test_the_shares_of_all_ranks_are_all_experts() -> None:
    shares = [experts_of_rank(rank, 3, 8) for rank in range(3)]
    assert [e for share in shares for e in share] == list(range(8))


def test_the_command_prints_one_number_per_document(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokens.json").write_text(json.dumps([TOKENS, TOKENS[:9]]))
    arguments = ["score", str(small_checkpoint), str(tmp_path / "tokens.json")]
    assert main(arguments) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole[0] == LocalScorer(small_checkpoint).nats(TOKENS)
    assert main([*arguments, "--num-ranks", "4", "--without-rank", "1"]) == 0
    assert json.loads(capsys.readouterr().out)[0] > 0
    assert len(whole) == 2
