"""The safetensors files of a checkpoint folder: which files must exist, their headers, and their
bytes, memory-mapped. Knows neither number formats nor which tensors a model needs."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from shared.errors import CheckpointError
from shared.model_spec import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """The location of a tensor's bytes. `dtype` is spelled as in the header."""

    name: str
    path: Path
    dtype: str
    shape: Shape
    first_byte: int  # in the file
    num_bytes: int

    def part(self, index: int) -> StoredTensor:
        """One index of the leading axis."""
        assert 0 <= index < self.shape[0], f"{self.name} has no part {index}"
        num_bytes = self.num_bytes // self.shape[0]
        first_byte = self.first_byte + index * num_bytes
        return replace(self, shape=self.shape[1:], first_byte=first_byte, num_bytes=num_bytes)


class MappedShards:
    """Memory-mapped files. Only pages of tensors that are read are mapped, and only during the
    read. The page cache keeps them for the next start and for other ranks of this host."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._opened: list[tuple[str, int, int, int]] = []
        for path in paths:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                self._opened.append(
                    (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Read-ahead would fetch experts of other ranks. `bytes_of` requests what is needed.
            mapped.madvise(mmap.MADV_RANDOM)
            self._maps[path] = mapped

    def fingerprint(self) -> str:
        """A hash that changes when a file is written, replaced or moved to another folder."""
        return hashlib.sha256(repr(sorted(self._opened)).encode()).hexdigest()

    @contextmanager
    def bytes_of(self, tensor: StoredTensor) -> Iterator[NDArray[np.uint8]]:
        """The bytes as uint8. The view must not be used after the `with` block."""
        mapped = self._maps[tensor.path]
        start = tensor.first_byte - tensor.first_byte % mmap.PAGESIZE
        length = tensor.first_byte + tensor.num_bytes - start
        if not tensor.num_bytes:
            yield np.zeros(0, dtype=np.uint8)
            return
        mapped.madvise(mmap.MADV_WILLNEED, start, length)
        try:
            yield np.frombuffer(mapped, np.uint8, tensor.num_bytes, tensor.first_byte)
        finally:
            mapped.madvise(mmap.MADV_DONTNEED, start, length)


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of all shards, from the headers. Raises CheckpointError if a shard is missing or
    truncated, or lacks a tensor that the index places in it."""
    weight_map = _weight_map(folder)
    if weight_map is None:
        return _read_header(folder / SINGLE_FILE)
    headers = {file: _read_header(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{folder / file}: tensor {name} is missing, though {INDEX_FILE} places it there; "
                "fetch this file again"
            )
    unindexed = {n: t for header in headers.values() for n, t in header.items()}
    return unindexed | {name: headers[file][name] for name, file in weight_map.items()}


def _weight_map(folder: Path) -> Mapping[str, str] | None:
    """The shard of each tensor; None if there is one file for all. Raises CheckpointError."""
    if not (folder / INDEX_FILE).exists():
        if not (folder / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; fetch the weights again"
            )
        return None
    weight_map = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{folder / INDEX_FILE} places tensor {name} in {file!r}, which is no file name; "
                "fetch it again"
            )
    return weight_map


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The library checks the header, and that the file has the right size. Raises
    CheckpointError."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or 'no such file'}; fetch the checkpoint again"
        ) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); fetch this file again"
        ) from error
    return {
        name: StoredTensor(
            name=name,
            path=path,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            first_byte=8 + header_bytes + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
