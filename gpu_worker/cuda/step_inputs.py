"""What a step's graph reads from the host, for one size of step: one pinned buffer and one copy to
the device. Knows the layout, not the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.cuda.kernels.paging import Paging
from gpu_worker.cuda.kernels.sampling import Draws
from gpu_worker.cuda.sampling_inputs import BANNED_MAX, RowDraw
from gpu_worker.engine.step_batch import StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """T tokens of S sequences, and R wanted rows. In a decode step all three are equal: row t is
    the one token of sequence t. In other steps, tiles have up to `tile_tokens` tokens of one
    sequence."""

    tokens: int
    sequences: int
    rows: int
    decode: bool
    tile_tokens: int = 1

    @property
    def tiles(self) -> int:
        return 0 if self.decode else self.tokens // self.tile_tokens + self.sequences


class StepInputs:
    """Views of one device buffer, which `upload` fills with what `fill` has written on the host."""

    def __init__(self, size: StepSize, table_width: int, device: torch.device) -> None:
        self.size = size
        self._fields: dict[str, tuple[int, tuple[int, ...]]] = {}
        end = 0
        for name, shape in _shapes(size, table_width).items():
            self._fields[name] = (end, shape)
            end += -(-int(np.prod(shape)) // 4) * 4  # each field is aligned to 16 bytes
        pinned = device.type == "cuda"
        # There are two, so that a step may be filled while the former still waits to be copied.
        self._hosts = [torch.zeros(end, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._copied = [torch.cuda.Event() if pinned else None for _ in range(2)]  # type: ignore[no-untyped-call]
        self._buffer_index = 0
        self._device = torch.zeros(end, dtype=torch.int32, device=device)
        self._host_values: NDArray[np.int32] = self._hosts[0].numpy()
        self.ids_T = self._view("ids")
        self.logits_rows_R = self._view("logits_rows")
        self.paging = Paging(
            self._view("position"),
            self._view("sequence"),
            self._view("tables"),
            None if size.decode else self._view("tiles"),
            size.tile_tokens,
        )
        self.draws = Draws(
            self._view("temperature").view(torch.float32),
            self._view("top_p").view(torch.float32),
            self._view("top_k"),
            self._view("uniform").view(torch.float32),
            self._view("banned"),
        )

    def fill(self, batch: StepBatch, draws: Sequence[RowDraw]) -> None:
        """Fills the host buffer. Rows after those of the batch have no token. `draws` has one entry
        per wanted row, or none for greedy sampling."""
        self._buffer_index ^= 1
        copied = self._copied[self._buffer_index]
        if copied is not None:
            copied.synchronize()
        self._host_values = self._hosts[self._buffer_index].numpy()
        tokens, rows = batch.num_tokens, batch.logits_rows_R.shape[0]
        sequences, width = batch.block_tables_SB.shape
        assert tokens <= self.size.tokens, "more tokens than this size of step holds"
        self._set("ids", batch.token_ids_T, 0)
        self._set("position", batch.position_T, -1)
        self._set("sequence", batch.sequence_T, 0)
        self._set("logits_rows", batch.logits_rows_R, 0)
        self._host_field("tables")[:sequences, :width] = batch.block_tables_SB
        if not self.size.decode:
            self._set("tiles", _tiles(batch.sequence_T, self.size.tile_tokens), 0)
        columns = list(zip(*draws, strict=True)) if draws else [()] * 5
        self._set_floats("temperature", columns[0])
        self._set_floats("top_p", columns[1])
        self._set("top_k", np.array(columns[2], dtype=np.int32), 0)
        self._set_floats("uniform", columns[3])
        banned_RX = self._host_field("banned")
        banned_RX.fill(-1)
        for row in range(rows if draws else 0):
            ids = draws[row].banned
            banned_RX[row, : len(ids)] = ids

    def upload(self) -> None:
        """Enqueues the copy to the device."""
        self._device.copy_(self._hosts[self._buffer_index], non_blocking=True)
        copied = self._copied[self._buffer_index]
        if copied is not None:
            copied.record()

    def _set(self, name: str, values: NDArray[np.int32], beyond: int) -> None:
        field = self._host_field(name)
        field[: len(values)] = values
        field[len(values) :] = beyond

    def _set_floats(self, name: str, values: Sequence[float]) -> None:
        field = self._host_field(name).view(np.float32)
        field[: len(values)] = values
        field[len(values) :] = 0.0

    def _host_field(self, name: str) -> NDArray[np.int32]:
        start, shape = self._fields[name]
        return self._host_values[start : start + int(np.prod(shape))].reshape(shape)

    def _view(self, name: str) -> Tensor:
        start, shape = self._fields[name]
        return self._device[start : start + int(np.prod(shape))].view(shape)


def _shapes(size: StepSize, table_width: int) -> dict[str, tuple[int, ...]]:
    rows = (size.rows,)
    return {
        "ids": (size.tokens,),
        "position": (size.tokens,),
        "sequence": (size.tokens,),
        "logits_rows": rows,
        "tables": (size.sequences, table_width),
        "tiles": (size.tiles, 2),
        "temperature": rows,
        "top_p": rows,
        "top_k": rows,
        "uniform": rows,
        "banned": (size.rows, BANNED_MAX),
    }


def _tiles(sequence_T: NDArray[np.int32], tile_tokens: int) -> NDArray[np.int32]:
    """(first token, count) per tile: the tokens of each sequence split into tiles."""
    starts = np.flatnonzero(np.diff(sequence_T, prepend=-1))
    ends = np.append(starts[1:], len(sequence_T))
    tiles = [
        (first, min(tile_tokens, end - first))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        for first in range(start, end, tile_tokens)
    ]
    return np.array(tiles, dtype=np.int32).reshape(-1, 2)
