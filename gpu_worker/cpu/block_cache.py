"""Saves the contents of a CPU model's KV blocks and loads them. Implements
`engine.kv_replication.BlockCache`."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from gpu_worker.cpu.decoder import Decoder
from gpu_worker.cpu.family import Floats
from gpu_worker.engine.kv_replication import Bytes


class CpuBlockCache:
    """A block's bytes are its rows of all cache arrays, layer by layer."""

    def __init__(self, model: Decoder) -> None:
        layers = [layer.cache_arrays() for layer in model.attention]
        arrays = [array for layer in layers for array in layer]
        self._rows_of = [array.view(np.uint8).reshape(len(array), -1) for array in arrays]
        assert all(np.may_share_memory(*pair) for pair in zip(self._rows_of, arrays, strict=True))
        ends = np.cumsum([rows.shape[1] for rows in self._rows_of]).tolist()
        self._parts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self._block_bytes: int = ends[-1]
        self._layout = f"cpu {model.spec.architecture} {_form(layers)}"
        self._staging_buffers: list[Bytes] = []

    @property
    def block_bytes(self) -> int:
        return self._block_bytes

    @property
    def layout(self) -> str:
        return self._layout

    def staging_buffer(self) -> Bytes:
        """Whole pages. They are written now, because the first touch of new memory is slow and must
        not happen during a step."""
        pages = mmap.mmap(-1, self._block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        staging_buffer = np.frombuffer(pages, dtype=np.uint8)
        staging_buffer.fill(0)
        self._staging_buffers.append(staging_buffer)
        return staging_buffer

    def save(self, block: int, into: Bytes) -> Callable[[], bool]:
        np.concatenate([rows[block] for rows in self._rows_of], out=into)
        return _always

    def load(self, block: int, content: Bytes) -> None:
        for rows, part in zip(self._rows_of, self._parts, strict=True):
            rows[block] = content[part]


def _form(layers: Sequence[Sequence[Floats]]) -> str:
    """The layout of a block: for each run of equal layers their number, dtypes and row shapes."""
    forms = [" ".join(f"{a.dtype.str}{list(a.shape[1:])}" for a in layer) for layer in layers]
    return ", ".join(f"{len(list(run))} x {form}" for form, run in groupby(forms))


def _always() -> bool:
    return True
