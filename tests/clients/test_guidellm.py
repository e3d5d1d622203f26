"""A short benchmark by guidellm: it finishes and reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from served import MODEL_DIR, Served

REQUESTS = 4
TOKENS = 8


def test_a_benchmark(served: Served, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    backend = f"kind=openai_http,target={served.url},model={served.model},api_key={served.key}"
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "guidellm"), "run", "--disable-progress"),
            *("--backend", backend),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={MODEL_DIR}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens={TOKENS}"),
            *("--output", f"kind=json,path={report}"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == REQUESTS
    assert not requests["errored"]
    assert {request["output_tokens"] for request in requests["successful"]} == {TOKENS}
