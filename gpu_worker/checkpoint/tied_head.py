"""A head that config.json ties to the embedding, in a checkpoint that stores one of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_worker.checkpoint.shards import MappedShards, StoredTensor
from shared.errors import CheckpointError

EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"


def check_tied_head(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Many checkpoints store a tied head as well, as a copy. Raises CheckpointError if it is none:
    transformers does not tie it then, and vLLM does."""
    if config.get("tie_word_embeddings") is not True:
        return
    embedding, head = tensors.get(EMBEDDING_NAME), tensors.get(HEAD_NAME)
    if embedding is None or head is None or _are_equal(embedding, head):
        return
    raise CheckpointError(
        f"config.json has tie_word_embeddings=true, but {head.path.name} stores a {HEAD_NAME} that "
        f"is not {EMBEDDING_NAME}: set it to false, or remove the tensor that is wrong"
    )


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    shards = MappedShards({one.path, other.path})
    with shards.bytes_of(one) as ours, shards.bytes_of(other) as theirs:
        return np.array_equal(ours, theirs)
