"""The expert slots of a CUDA rank: preallocated weights, what each slot holds, and loads from
pinned host memory on a side stream while decode continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.checkpoint.slot_ledger import SlotLedger
from gpu_worker.cuda.experts.checksum import checksum
from gpu_worker.cuda.experts.expert_form import ExpertForm, NumberFormat
from gpu_worker.cuda.streams import on_stream
from gpu_worker.cuda.weights.mxfp4_matrix import ExpertMatrix, Mxfp4Matrix
from gpu_worker.cuda.weights.scaled_blocks import CODES_STD, ScaledBlocks, fill_codes
from shared.types import EMPTY_SLOT


class SlotAssignment(NamedTuple):
    """A slot and the expert that it should hold."""

    layer: int
    slot: int
    expert: int


class SlotUpload(NamedTuple):
    """`values` holds one expert, flat: the parts of an `ExpertForm`. It should be pinned; otherwise
    the copy blocks. `checksum` is that of `checksum.checksum_of`; without it nobody looks at what
    has arrived."""

    layer: int
    slot: int
    expert: int
    values: Tensor
    checksum: int | None = None


_CHECKED_TOGETHER = 8
"""Experts. Changing streams takes the host as long as a copy of 0.5 MB."""


class _LoadStreams(NamedTuple):
    copies: torch.cuda.Stream
    checksums: torch.cuda.Stream


class CudaSlots:
    """MoE layers L, slots S, hidden H, inner I, J = 2I (gate, then up; in MXFP4 eight rows of each
    in turn). If `form.has_scales`, the weights are codes as in `ScaledBlocks` or `Mxfp4Matrix`, and
    have scales `[L, S, …]`; if `form.biased`, they have biases. Otherwise those are None.

    No table that a running step reads may name a slot that an upload writes. The planner ensures
    this: it names a slot only after `contents` shows its expert.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        slots_per_rank: int,
        hidden_size: int,
        inner_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        number_format: NumberFormat = NumberFormat.PLAIN,
        biased: bool = False,
    ) -> None:
        leading = (num_layers, slots_per_rank)
        self.form = form = ExpertForm(
            hidden_size=hidden_size,
            inner_size=inner_size,
            dtype=dtype,
            number_format=number_format,
            biased=biased,
        )
        self.device = device
        self.parts = [  # of `form`, each with all layers and slots
            torch.zeros((*leading, *part.shape), device=device, dtype=part.dtype)
            for part in form.parts
        ]
        self.w_gate_up_LSJH, self.w_down_LSHI = self.parts[:2]
        self.gate_up_scales = self.parts[2] if form.has_scales else None
        self.down_scales = self.parts[3] if form.has_scales else None
        self.b_gate_up_LSJ = self.parts[-2] if form.biased else None
        self.b_down_LSH = self.parts[-1] if form.biased else None
        self.num_layers, self.slots_per_rank = leading
        self._ledger = SlotLedger(num_layers, slots_per_rank)
        self._streams: _LoadStreams | None = None
        if device.type == "cuda":
            copies, checksums = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams = _LoadStreams(copies, checksums)

    @property
    def contents(self) -> NDArray[np.int16]:
        """A copy, `[L, S]`: the expert that each slot holds completely, or EMPTY_SLOT."""
        return self._ledger.contents

    def gate_up(self, layer: int) -> ExpertMatrix:
        """`[S, 2I, H]`, for the kernels."""
        return self._matrix(self.w_gate_up_LSJH, self.gate_up_scales, layer)

    def down(self, layer: int) -> ExpertMatrix:
        """`[S, H, I]`, for the kernels."""
        return self._matrix(self.w_down_LSHI, self.down_scales, layer)

    def _matrix(self, weights_LS: Tensor, scales_LS: Tensor | None, layer: int) -> ExpertMatrix:
        if scales_LS is None:
            return weights_LS[layer]
        of_format = ScaledBlocks if self.form.number_format is NumberFormat.FP8 else Mxfp4Matrix
        return of_format(weights_LS[layer], scales_LS[layer])

    def begin_load(self, wanted_LS: NDArray[np.int16]) -> list[SlotAssignment]:
        """Marks slots that are wanted EMPTY as empty. Returns the wanted assignments that are
        missing; their slots stay as they are until `load`."""
        present_LS = self.contents
        assert wanted_LS.shape == present_LS.shape, "the assignment is for other slots"
        differs_LS = wanted_LS != present_LS
        for layer, slot in np.argwhere(differs_LS & (wanted_LS < 0)).tolist():
            self._ledger.set(layer, slot, EMPTY_SLOT)
        return [
            SlotAssignment(layer, slot, int(wanted_LS[layer, slot]))
            for layer, slot in np.argwhere(differs_LS & (wanted_LS >= 0)).tolist()
        ]

    def load(self, uploads: Sequence[SlotUpload]) -> list[SlotUpload]:
        """Returns when all slots are loaded, which are EMPTY until then: the uploads of which
        something else has arrived than what their checksum is of. Their slots remain EMPTY. This
        does not wait for the steps' stream, which does not wait for this either."""
        for upload in uploads:
            self._ledger.set(upload.layer, upload.slot, EMPTY_SLOT)
        damaged = []
        for upload, found in zip(uploads, self._copy_all(uploads), strict=True):
            if upload.checksum is not None and found != upload.checksum:
                damaged.append(upload)
            else:
                self._ledger.set(upload.layer, upload.slot, upload.expert)
        return damaged

    def fill_randomly(self, num_experts: int, *, std: float) -> None:
        """Puts a random expert e into slot e of every layer, for measurements and tests."""
        for layer in range(self.num_layers):
            for matrix in (self.gate_up(layer), self.down(layer)):
                _fill_randomly(matrix, num_experts, std)
            for bias in self.parts[-2:] if self.form.biased else ():
                bias[layer, :num_experts].normal_(std=std)
            for expert in range(num_experts):
                self._ledger.set(layer, expert, expert)

    def _copy_all(self, uploads: Sequence[SlotUpload]) -> list[int]:
        """The checksums of what the slots then hold; 0 for those without one. Some experts' are
        computed while the next ones are on their way."""
        if self._streams is None:
            return _as_numbers([_checksum_of(u, self._copy(u)) for u in uploads])
        sums: list[Tensor] = []
        copies, checksums = self._streams
        for first in range(0, len(uploads), _CHECKED_TOGETHER):
            group = uploads[first : first + _CHECKED_TOGETHER]
            with on_stream(copies):
                parts = [self._copy(upload) for upload in group]
                arrived = copies.record_event()
            with on_stream(checksums):
                checksums.wait_event(arrived)
                sums += [_checksum_of(u, own) for u, own in zip(group, parts, strict=True)]
        with on_stream(checksums):
            return _as_numbers(sums)

    def _copy(self, upload: SlotUpload) -> list[Tensor]:
        """The slot's parts."""
        parts = [part[upload.layer, upload.slot] for part in self.parts]
        for part, given in zip(parts, self.form.split(upload.values), strict=True):
            part.copy_(given, non_blocking=True)
        return parts


def _checksum_of(upload: SlotUpload, parts: Sequence[Tensor]) -> Tensor:
    if upload.checksum is not None:
        return checksum(parts)
    return torch.zeros((), dtype=torch.int64, device=parts[0].device)


def _as_numbers(sums: Sequence[Tensor]) -> list[int]:
    """Waits for them."""
    return torch.stack(list(sums)).tolist() if sums else []


def _fill_randomly(weights: ExpertMatrix, num_experts: int, std: float) -> None:
    """Codes get a deviation of their own: their scales make it `std`."""
    if isinstance(weights, Mxfp4Matrix):
        of_experts = Mxfp4Matrix(weights.codes[:num_experts], weights.scales[:num_experts])
        of_experts.fill_randomly(std)
    elif isinstance(weights, ScaledBlocks):
        for codes in weights.codes[:num_experts]:
            fill_codes(codes)
        weights.scales[:num_experts] = std / CODES_STD
    else:
        weights[:num_experts].normal_(std=std)
