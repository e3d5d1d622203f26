"""Reads one expert from a checkpoint into host memory, in the layout of a CUDA rank's slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.checkpoint.mlp_names import USUAL_NAMES, MlpNames
from gpu_worker.cuda.experts.expert_form import ExpertForm, NumberFormat
from gpu_worker.cuda.weights.scaled_blocks import BLOCK
from gpu_worker.cuda.weights.weight_reader import copy_onto_host


class ExpertSource(Protocol):
    """Implemented by `ExpertReader`, `fused_expert_reader.FusedExpertReader` and `NoExperts`. May
    be used by several threads. Layers are MoE layers."""

    @property
    def form(self) -> ExpertForm: ...

    def read(self, layer: int, expert: int, out_N: Tensor) -> None:
        """Writes the parts of `form`, flat, to `out_N`. Raises CheckpointError."""
        ...


class ExpertReader:
    """Each expert has tensors of its own. `prefix_of` takes a MoE layer and an expert, and returns
    what their names begin with. If `scaled`, experts stay in block-scaled FP8; otherwise they
    become `dtype`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix_of: Callable[[int, int], str],
        dtype: torch.dtype,
        *,
        matrix_names: MlpNames = USUAL_NAMES,
        scaled: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._prefix_of = prefix_of
        self._matrix_names = matrix_names
        inner, hidden = checkpoint.shape(_names(prefix_of(0, 0), matrix_names)[0])
        self.form = ExpertForm(
            hidden_size=hidden,
            inner_size=inner,
            dtype=dtype,
            number_format=NumberFormat.FP8 if scaled else NumberFormat.PLAIN,
        )

    def read(self, layer: int, expert: int, out_N: Tensor) -> None:
        gate_up_JH, down_HI, *scales = self.form.split(out_N)
        names = _names(self._prefix_of(layer, expert), self._matrix_names)
        weights = [*gate_up_JH.chunk(2), down_HI]
        if not scales:
            for name, out in zip(names, weights, strict=True):
                copy_onto_host(self._checkpoint, name, out.view(-1))
            return
        of_weights = [*scales[0].chunk(2), scales[1]]
        for name, out, scale in zip(names, weights, of_weights, strict=True):
            self._checkpoint.copy_codes(name, out.view(torch.uint8).numpy(), scale.numpy())


class NoExperts:
    """Of a dense model: what placement counts as its one expert has no values."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        self.form = ExpertForm(hidden_size=hidden_size, inner_size=0, dtype=dtype)

    def read(self, layer: int, expert: int, out_N: Tensor) -> None:
        pass


def are_scaled(
    checkpoint: Checkpoint, prefixes: Iterable[str], matrix_names: MlpNames = USUAL_NAMES
) -> bool:
    """Whether the checkpoint has all matrices of the experts whose names begin with `prefixes` in
    FP8, with blocks of the size that the kernels take."""
    return all(
        checkpoint.fp8_block(name) == (BLOCK, BLOCK)
        for prefix in prefixes
        for name in _names(prefix, matrix_names)
    )


def _names(prefix: str, matrix_names: MlpNames) -> list[str]:
    return [f"{prefix}.{name}.weight" for name in matrix_names]
