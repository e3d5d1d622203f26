"""The exchange between two cards: exact, and through a death and a rejoin without a wrong token.
The experiment is the test: real processes, Mooncake's kernels, a real etcd, real signals."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(
        find_spec("mooncake") is None or find_spec("mooncake.ep") is None,
        reason="needs a CUDA build of Mooncake",
    ),
]


def run(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.gpu_ep", *arguments, "--ranks", "2", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, timeout=240, check=True)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_what_comes_back_is_exact_in_bf16_and_close_in_fp8(tmp_path: Path) -> None:
    result = run(tmp_path / "out.json", "micro", "--tokens", "64")
    assert result["bf16"]["exact"]
    assert result["fp8"]["relative_error"] < 0.04


def test_no_committed_step_has_a_wrong_token_whoever_dies_stops_or_joins(tmp_path: Path) -> None:
    small = ("--layers", "4", "--experts", "32", "--redundant", "32", "--intermediate", "64")
    faults = ("--faults", "KILL:1", "STOP:1", "KILL:1")
    result = run(tmp_path / "out.json", "faults", *small, "--segment-steps", "10", *faults)
    assert result["wrong_steps"] == 0
    assert result["committed_steps"] > 0
    assert [fault["abandoned_steps_max"] for fault in result["faults"]] == [1, 1, 1]
