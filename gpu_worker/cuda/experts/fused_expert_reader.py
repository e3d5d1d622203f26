"""Reads one expert of a layer whose experts are stored together, as gpt-oss has them: matrices by
input, gate and up interleaved, and biases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.checkpoint.stored_form import MXFP4
from gpu_worker.cuda.experts.expert_form import ExpertForm


class FusedExpertReader:
    """Implements `expert_reader.ExpertSource`. `prefix_of` takes a MoE layer, and returns what the
    names of its experts' tensors begin with."""

    def __init__(
        self, checkpoint: Checkpoint, prefix_of: Callable[[int], str], dtype: torch.dtype
    ) -> None:
        self._checkpoint = checkpoint
        self._prefix_of = prefix_of
        _, inner, hidden = checkpoint.shape(f"{prefix_of(0)}.down_proj")
        self.form = ExpertForm(hidden_size=hidden, inner_size=inner, dtype=dtype, biased=True)

    def read(self, layer: int, expert: int, out_N: Tensor) -> None:
        """Column 2i of the stored matrix is gate i, column 2i + 1 is up i."""
        prefix = self._prefix_of(layer)
        gate_up_JH, down_HI, b_gate_up_J, b_down_H = self.form.split(out_N)
        gate_up_HJ = self._part(f"{prefix}.gate_up_proj", expert)
        bias_J = self._part(f"{prefix}.gate_up_proj_bias", expert)
        for half in (0, 1):
            gate_up_JH.chunk(2)[half].copy_(gate_up_HJ[:, half::2].T)
            b_gate_up_J.chunk(2)[half].copy_(bias_J[half::2])
        del gate_up_HJ
        down_HI.copy_(self._part(f"{prefix}.down_proj", expert).T)
        b_down_H.copy_(self._part(f"{prefix}.down_proj_bias", expert))

    def _part(self, name: str, expert: int) -> Tensor:
        """In a dtype that loses nothing."""
        if self._checkpoint.stored_dtype(name) in ("BF16", MXFP4):
            bits = self._checkpoint.read_bits_part(name, expert)
            return torch.from_numpy(bits).view(torch.bfloat16)
        return torch.from_numpy(self._checkpoint.read_part(name, expert))
