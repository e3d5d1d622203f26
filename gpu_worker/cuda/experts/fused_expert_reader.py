"""Reads one expert of a layer whose experts are stored together, as gpt-oss has them: matrices by
input, gate and up interleaved, and biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.checkpoint.quantisation import MXFP4_GROUP_BYTES, Codes
from gpu_worker.checkpoint.stored_form import MXFP4
from gpu_worker.cuda.experts.expert_form import ExpertForm, NumberFormat
from gpu_worker.cuda.weights.mxfp4_matrix import TURN_ROWS, in_turns, put_codes, put_scales

_MATRICES = ("gate_up_proj", "down_proj")


class FusedExpertReader:
    """Implements `expert_reader.ExpertSource`. `prefix_of` takes a MoE layer, and returns what the
    names of its experts' tensors begin with. If `in_mxfp4`, matrices stay so; otherwise they become
    `dtype`, as biases always do."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix_of: Callable[[int], str],
        dtype: torch.dtype,
        *,
        in_mxfp4: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._prefix_of = prefix_of
        _, inner, hidden = checkpoint.shape(f"{prefix_of(0)}.down_proj")
        self.form = ExpertForm(
            hidden_size=hidden,
            inner_size=inner,
            dtype=dtype,
            number_format=NumberFormat.MXFP4 if in_mxfp4 else NumberFormat.PLAIN,
            biased=True,
        )

    def read(self, layer: int, expert: int, out_N: Tensor) -> None:
        """Column 2i of the stored matrix is gate i, column 2i + 1 is up i."""
        prefix = self._prefix_of(layer)
        *weights, b_gate_up_J, b_down_H = self.form.split(out_N)
        if self.form.number_format is NumberFormat.MXFP4:
            gate_up, down, gate_up_scales, down_scales = (part.numpy() for part in weights)
            self._copy_groups(f"{prefix}.gate_up_proj", expert, gate_up, gate_up_scales)
            self._copy_groups(f"{prefix}.down_proj", expert, down, down_scales)
        else:
            self._widen(prefix, expert, *weights)
        bias_J = self._part(f"{prefix}.gate_up_proj_bias", expert)
        for half in (0, 1):
            b_gate_up_J.chunk(2)[half].copy_(bias_J[half::2])
        b_down_H.copy_(self._part(f"{prefix}.down_proj_bias", expert))

    def _widen(self, prefix: str, expert: int, gate_up_JH: Tensor, down_HI: Tensor) -> None:
        gate_up_HJ = self._part(f"{prefix}.gate_up_proj", expert)
        for half in (0, 1):
            gate_up_JH.chunk(2)[half].copy_(gate_up_HJ[:, half::2].T)
        del gate_up_HJ
        down_HI.copy_(self._part(f"{prefix}.down_proj", expert).T)

    def _copy_groups(self, name: str, expert: int, codes: Codes, scales: Codes) -> None:
        """The tensor as it is, in the order of `Mxfp4Matrix`."""
        num_rows, half = codes.shape
        groups = half // MXFP4_GROUP_BYTES
        blocks_NGB = np.empty((num_rows, groups, MXFP4_GROUP_BYTES), dtype=np.uint8)
        scales_NG = np.empty((num_rows, groups), dtype=np.uint8)
        self._checkpoint.copy_mxfp4_part(name, expert, blocks_NGB, scales_NG)
        if name.endswith("gate_up_proj"):
            turns = (-1, 2, TURN_ROWS, half)
            put_codes(in_turns(blocks_NGB), codes.reshape(turns))
            put_scales(in_turns(scales_NG).reshape(num_rows, groups), scales)
        else:
            put_codes(blocks_NGB, codes)
            put_scales(scales_NG, scales)

    def _part(self, name: str, expert: int) -> Tensor:
        """In a dtype that loses nothing."""
        if self._checkpoint.stored_dtype(name) in ("BF16", MXFP4):
            bits = self._checkpoint.read_bits_part(name, expert)
            return torch.from_numpy(bits).view(torch.bfloat16)
        return torch.from_numpy(self._checkpoint.read_part(name, expert))


def are_in_mxfp4(checkpoint: Checkpoint, prefixes: Iterable[str]) -> bool:
    """Whether the checkpoint has all matrices of the experts under `prefixes` in MXFP4. Then both
    sizes of an expert are multiples of 32, as the kernels need."""
    names = [f"{prefix}.{name}" for prefix in prefixes for name in _MATRICES]
    return all(checkpoint.stored_dtype(name) == MXFP4 for name in names)
