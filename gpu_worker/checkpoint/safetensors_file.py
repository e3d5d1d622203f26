"""A safetensors file whose header is written first and whose tensors are then written one by one,
in any order and by any number of threads. The library's `save_file` needs all tensors in memory and
writes them from one thread; the bytes are the same."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from gpu_worker.checkpoint.checkpoint import Shape

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}
_ALIGNMENT = 8


class SafetensorsFile:
    """The file is sparse until every tensor is written."""

    def __init__(
        self, path: Path, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        header, self._offsets, size = _layout(shapes, dtypes)
        self._dtypes = dtypes
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(self._fd, size)
        _write_at(self._fd, memoryview(header), 0)

    def write(self, name: str, values: torch.Tensor) -> int:
        """Writes one tensor; returns its bytes. Any thread; each tensor once."""
        assert values.dtype is self._dtypes[name]
        raw = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
        _write_at(self._fd, raw, self._offsets[name])
        return raw.nbytes

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)


def _layout(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]
) -> tuple[bytes, dict[str, int], int]:
    """The header, the offset of each tensor in the file, and the size of the file. Wide dtypes come
    first, so that all tensors are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name)):
        begins[name] = end
        end += torch.Size(shapes[name]).numel() * dtypes[name].itemsize
        entries[name] = {
            "dtype": _NAMES[dtypes[name]],
            "shape": list(shapes[name]),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + at for name, at in begins.items()}, len(header) + end


def _write_at(fd: int, raw: memoryview, offset: int) -> None:
    """Repeats the call, because one call writes at most 2 GiB."""
    while raw.nbytes:
        written = os.pwrite(fd, raw, offset)
        raw, offset = raw[written:], offset + written
