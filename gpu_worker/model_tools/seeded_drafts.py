"""The layer of multi-token prediction of a seeded checkpoint: which of its tensors are copies of
the decoder's, and what makes its guesses good."""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.common_tensors import FINAL_NORM_NAME, head_name
from gpu_worker.checkpoint.draft_tensors import DraftNames
from gpu_worker.checkpoint.tied_head import EMBEDDING_NAME
from shared.model_spec import ModelSpec

_WEAK = np.float32(0.02)
"""What is left of a decoder's context if guesses are good: enough to prove some of them wrong."""


class Guesses(Enum):
    """RANDOM: the layer is as random as the decoder, and almost never right. GOOD: the decoder's
    next token depends mostly on its last one; the layer looks at that alone, with the decoder's own
    head."""

    RANDOM = "random"
    GOOD = "good"


class SeededDrafts:
    def __init__(self, spec: ModelSpec, names: DraftNames, guesses: Guesses) -> None:
        self._names = names
        self._is_good = guesses is Guesses.GOOD
        self._source_of = {names.embedding: EMBEDDING_NAME, names.head: head_name(spec)}
        if self._is_good:
            self._source_of[names.final_norm] = FINAL_NORM_NAME

    def source_of(self, name: str) -> str:
        """The tensor whose values this one has."""
        return self._source_of.get(name, name)

    def edited(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The values of the tensor `name`, which were drawn as `values`; may change them."""
        if not self._is_good:
            return values
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values *= np.float32(0) if name.startswith(f"{self._names.prefix}.") else _WEAK
        elif name == self._names.token_norm:
            values[:] = 1
        elif name == self._names.joint:  # the embedding alone
            values[:] = np.eye(*values.shape, dtype=np.float32)
        return values
