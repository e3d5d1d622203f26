"""`starfish eval` against an instance of its own: the score is that of one process, and a rank's
death in the middle changes no digit of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.evaluate.documents import read_documents
from gpu_worker.model_tools.scoring import LocalScorer

MODEL = Path(__file__).parents[2] / "models" / "starling-14m"
NUM_DOCUMENTS = 8


@pytest.mark.timeout(300)
def test_a_killed_rank_changes_no_digit_and_dropped_experts_would_have() -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "cli", "eval", "--own", "--kill", "--json"),
            *("--model", str(MODEL), "--limit", str(NUM_DOCUMENTS), "--ranks", "3"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["same_to_the_bit"] is True
    assert report["bits_per_byte_killed"] == report["bits_per_byte"]
    assert report["bits_per_byte_dropped"] > 1.1 * report["bits_per_byte"]
    documents = read_documents(MODEL / "heldout.jsonl", MODEL, 2048)[:NUM_DOCUMENTS]
    scorer = LocalScorer(MODEL)
    nats = sum(scorer.nats(document.tokens) for document in documents)
    num_bytes = sum(document.num_bytes for document in documents)
    assert report["bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / num_bytes)


def test_an_unreadable_file_of_documents_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "eval", "--run-dir", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "starfish up" in ran.stderr
