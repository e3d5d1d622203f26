"""Seeded checkpoints with a layer of multi-token prediction, and what makes its guesses good or
bad."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.model_spec import NUM_DRAFT_LAYERS

FAMILIES = ("deepseek_v3", "deepseek_v32", "glm4_moe")

Tensors = dict[str, torch.Tensor]
_WEAK = 0.02
"""How much of the context is left in a weak decoder: enough that two tokens differ now and then."""


def save_with_draft_layer(folder: Path, family: str = "deepseek_v3", **changes: Any) -> Path:
    """Its guesses are as good as random."""
    changes = {NUM_DRAFT_LAYERS: 1, **changes}
    create_seeded_checkpoint(folder, 11, num_shards=1, family=family, **changes)
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


def let_guesses_be_good(folder: Path) -> Path:
    """The decoder's next token comes mostly from its last one, which is all that the draft layer
    looks at: it applies the decoder's own head to that token's embedding."""

    def edit(tensors: Tensors, layer: str) -> Tensors:
        size = tensors["model.norm.weight"].shape[0]
        changed = {
            name: tensor * (0.0 if name.startswith(layer) else _WEAK)
            for name, tensor in tensors.items()
            if name.endswith(("o_proj.weight", "down_proj.weight"))
        }
        return changed | {
            f"{layer}.enorm.weight": torch.ones(size),
            f"{layer}.eh_proj.weight": torch.cat([torch.eye(size), torch.zeros(size, size)], 1),
            f"{layer}.shared_head.norm.weight": tensors["model.norm.weight"].clone(),
        }

    return edit_tensors(folder, edit)


def let_guesses_be_wrong(folder: Path) -> Path:
    """After `let_guesses_be_good`: the least likely token in place of the likeliest."""

    def edit(tensors: Tensors, layer: str) -> Tensors:
        name = f"{layer}.shared_head.norm.weight"
        return {name: -tensors[name]}

    return edit_tensors(folder, edit)
