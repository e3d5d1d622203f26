"""Seeded checkpoints with a layer of multi-token prediction, and edits of their tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from gpu_worker.model_tools.seeded_drafts import Guesses

FAMILIES = ("deepseek_v3", "deepseek_v32", "glm4_moe")

Tensors = dict[str, torch.Tensor]


def save_with_drafts(
    folder: Path, family: str = "deepseek_v3", guesses: Guesses = Guesses.RANDOM, **changes: Any
) -> Path:
    create_seeded_checkpoint(folder, 11, num_shards=1, family=family, guesses=guesses, **changes)
    return folder


def edit_tensors(folder: Path, edit: Callable[[Tensors, str], Tensors]) -> Path:
    """`edit` gets the tensors and the prefix of the layer that drafts, and returns what differs."""
    path = folder / "model.safetensors"
    layer = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    tensors = load_file(path)
    changed = edit(tensors, f"model.layers.{layer}")
    save_file(
        {name: tensor.contiguous() for name, tensor in (tensors | changed).items()},
        path,
        metadata={"format": "pt"},
    )
    return folder


def let_guesses_be_wrong(folder: Path) -> Path:
    """Of one whose guesses are good: the least likely token in place of the likeliest."""

    def edit(tensors: Tensors, layer: str) -> Tensors:
        name = f"{layer}.shared_head.norm.weight"
        return {name: -tensors[name]}

    return edit_tensors(folder, edit)
