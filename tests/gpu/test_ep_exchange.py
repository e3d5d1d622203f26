"""The exchange between two ranks is exact, and the whole server over it gives every client the
tokens of an undisturbed run, whoever dies, stops or joins: real processes, Mooncake's kernels, a
real etcd, real signals. On one card the ranks share it under CUDA MPS."""

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
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device"),
    pytest.mark.skipif(
        find_spec("mooncake") is None or find_spec("mooncake.ep") is None,
        reason="needs a CUDA build of Mooncake",
    ),
]


def run(out: Path, module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, *arguments, "--ranks", "2", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, timeout=360, check=True)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_what_comes_back_is_exact_in_bf16_and_close_in_fp8(tmp_path: Path) -> None:
    result = run(tmp_path / "out.json", "benchmarks.gpu_exchange", "--tokens", "64")
    assert result["bf16"]["exact"]
    assert result["fp8"]["relative_error"] < 0.04


SMALL = (
    *("num_hidden_layers=4", "hidden_size=512", "num_experts=16", "num_experts_per_tok=4"),
    *("moe_intermediate_size=64", "head_dim=64"),
)


GPT_OSS = (
    *("num_hidden_layers=3", "hidden_size=320", "num_local_experts=16", "num_experts_per_tok=4"),
    *("intermediate_size=64", "head_dim=64", "vocab_size=4096"),
)
"""Of rows that are filled up on their way."""


@pytest.mark.parametrize(
    ("family", "sizes", "form"),
    [("qwen3_moe", SMALL, "bf16"), ("qwen3_moe", SMALL, "fp8"), ("gpt_oss", GPT_OSS, "bf16")],
)
def test_every_client_gets_the_undisturbed_tokens(
    family: str, sizes: tuple[str, ...], form: str, tmp_path: Path
) -> None:
    faults = ("--faults", "KILL:1", "STOP:1", "KILL:1")
    result = run(
        tmp_path / "out.json",
        "benchmarks.gpu_serve",
        *("--device", "cuda", "--seeded-dir", str(tmp_path / "model"), "--streams", "8"),
        *("--family", family, "--config", *sizes, *faults),
        *("--rank-option", f"ep_dispatch={form}"),
    )
    assert [fault["fault"] for fault in result["faults"]] == ["KILL:1", "STOP:1", "KILL:1"]
    assert [(fault["failed"], fault["wrong"]) for fault in result["faults"]] == [([], [])] * 3


def test_a_rank_that_was_stopped_comes_back_in_its_process(tmp_path: Path) -> None:
    """With the weights, graphs and buffer that it has, as a new incarnation, twice."""
    result = run(
        tmp_path / "out.json",
        "benchmarks.gpu_serve",
        *("--device", "cuda", "--seeded-dir", str(tmp_path / "model"), "--streams", "8"),
        *("--redundant-experts", "16", "--config", *SMALL, "--faults", "PAUSE:1", "PAUSE:1"),
    )
    assert [fault["fault"] for fault in result["faults"]] == ["PAUSE:1", "PAUSE:1"]
    for fault in result["faults"]:
        assert (fault["failed"], fault["wrong"]) == ([], [])
        assert fault["in_place"] == fault["victims"]
        assert fault["checked"] > 0
