"""A short benchmark by aiperf: it finishes and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from served import MODEL_DIR, Served

REQUESTS = 4
TOKENS = 8


def test_a_benchmark(served: Served, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "aiperf"), "profile", "--ui", "none"),
            *("--model", served.model, "--url", served.url, "--api-key", served.key),
            *("--endpoint-type", "chat", "--streaming"),
            *("--tokenizer", str(MODEL_DIR), "--use-server-token-count"),
            *("--request-count", str(REQUESTS), "--concurrency", "2"),
            *("--isl", "16", "--osl", str(TOKENS), "--extra-inputs", "ignore_eos:true"),
            *("--artifact-dir", str(tmp_path / "artifacts")),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = (tmp_path / "artifacts").rglob("profile_export_aiperf.json")
    report = json.loads(summary.read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert report["output_sequence_length"]["avg"] == TOKENS
    assert report["time_to_first_token"]["avg"] > 0
