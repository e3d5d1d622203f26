"""Reads one expert from a checkpoint into host memory, in the layout of a CUDA rank's slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.checkpoint.mlp_names import USUAL_NAMES
from gpu_worker.cuda.experts.expert_form import ExpertForm
from gpu_worker.cuda.weights.scaled_blocks import BLOCK
from gpu_worker.cuda.weights.weight_reader import copy_onto_host


class ExpertReader:
    """May be used by several threads. `prefix_of` takes a MoE layer and an expert, and returns what
    the names of the expert's tensors begin with. If `scaled`, experts stay in block-scaled FP8;
    otherwise they become `dtype`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix_of: Callable[[int, int], str],
        dtype: torch.dtype,
        *,
        scaled: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._prefix_of = prefix_of
        inner, hidden = checkpoint.shape(_names(prefix_of(0, 0))[0])
        self.form = ExpertForm(hidden_size=hidden, inner_size=inner, dtype=dtype, scaled=scaled)

    @property
    def dtype(self) -> torch.dtype:
        """Of an expert that lies flat in memory."""
        return self.form.flat_dtype

    @property
    def num_values(self) -> int:
        return self.form.num_values

    @property
    def num_bytes(self) -> int:
        return self.form.num_bytes

    def read(self, layer: int, expert: int, out_N: Tensor) -> None:
        """Writes the parts of `form`, flat, to `out_N`. Raises CheckpointError."""
        gate_up_JH, down_HI, *scales = self.form.split(out_N)
        names = _names(self._prefix_of(layer, expert))
        weights = [*gate_up_JH.chunk(2), down_HI]
        if not scales:
            for name, out in zip(names, weights, strict=True):
                copy_onto_host(self._checkpoint, name, out.view(-1))
            return
        of_weights = [*scales[0].chunk(2), scales[1]]
        for name, out, scale in zip(names, weights, of_weights, strict=True):
            self._checkpoint.copy_codes(name, out.view(torch.uint8).numpy(), scale.numpy())


def are_scaled(checkpoint: Checkpoint, prefixes: Iterable[str]) -> bool:
    """Whether the checkpoint has all matrices of the experts whose names begin with `prefixes` in
    FP8, with blocks of the size that the kernels take."""
    return all(
        checkpoint.fp8_block(name) == (BLOCK, BLOCK)
        for prefix in prefixes
        for name in _names(prefix)
    )


def _names(prefix: str) -> list[str]:
    return [f"{prefix}.{name}.weight" for name in USUAL_NAMES]
