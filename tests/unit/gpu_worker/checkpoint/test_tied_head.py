"""A checkpoint that stores a head of its own, though config.json ties it to the embedding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpu_worker.checkpoint.checkpoint import open_checkpoint
from gpu_worker.checkpoint.tied_head import EMBEDDING_NAME, HEAD_NAME
from shared.errors import CheckpointError

EMBEDDING_VH = np.arange(6, dtype=np.float32).reshape(3, 2)


def write(folder: Path, head_VH: np.ndarray | None, *, tied: bool) -> Path:  # type: ignore[type-arg]
    tensors = {EMBEDDING_NAME: EMBEDDING_VH} | ({} if head_VH is None else {HEAD_NAME: head_VH})
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return folder


@pytest.mark.parametrize("head_VH", [None, EMBEDDING_VH.copy()], ids=["no head", "a copy"])
def test_a_copy_of_the_embedding_is_tied(tmp_path: Path, head_VH: None) -> None:
    folder = write(tmp_path, head_VH, tied=True)
    assert open_checkpoint(folder, {EMBEDDING_NAME: (3, 2)}).has(EMBEDDING_NAME)


def test_another_head_belongs_to_a_model_that_is_not_tied(tmp_path: Path) -> None:
    """transformers does not tie it then: its logits are the stored head's."""
    other_VH = EMBEDDING_VH + 1
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_checkpoint(write(tmp_path, other_VH, tied=True), {EMBEDDING_NAME: (3, 2)})
    folder = write(tmp_path, other_VH, tied=False)
    read = open_checkpoint(folder, {HEAD_NAME: (3, 2)}).read(HEAD_NAME)
    assert np.array_equal(read, other_VH)
