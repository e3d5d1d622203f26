"""The random checkpoint that `benchmarks.gpu_serve` and `benchmarks.gpu_server` make, with
progress."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.clock import Clock
from shared.errors import ConfigError

_NUM_SHARDS = 32


def entries_of(texts: Sequence[str]) -> dict[str, Any]:
    """The entries of texts `KEY=VALUE`, whose values are JSON. Raises ConfigError."""
    pairs = dict(text.partition("=")[::2] for text in texts)
    if "" in pairs.values():
        raise ConfigError(f"--config {' '.join(texts)}: say NAME=VALUE")
    return {key: json.loads(value) for key, value in pairs.items()}


def make_checkpoint(
    folder: Path, entries: Mapping[str, Any], clock: Clock, *, family: str = "qwen3_moe"
) -> None:
    """Writes a bfloat16 checkpoint with these entries of config.json. Raises CheckpointError."""
    import torch

    from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint

    began, tenths = clock.now(), 0

    def on_progress(done: int, total: int) -> None:
        nonlocal tenths
        if 10 * done // total > tenths:
            tenths = 10 * done // total
            print(f"  checkpoint: {10 * tenths} % ({clock.now() - began:.0f} s)", flush=True)

    create_seeded_checkpoint(
        folder,
        num_shards=_NUM_SHARDS,
        family=family,
        dtype=torch.bfloat16,
        on_progress=on_progress,
        **entries,
    )
