"""A Hugging Face checkpoint's safetensors, memory-mapped: checked when opened, read tensor by
tensor as float32. Knows nothing of architectures."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from shared.errors import CheckpointError
from shared.model_spec import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Shape = tuple[int, ...]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    path: Path
    dtype: str
    shape: Shape
    first_byte: int  # in the file
    num_bytes: int


class Checkpoint:
    """The tensors of an opened folder. `read` may be called from several threads."""

    def __init__(self, folder: Path, tensors: Mapping[str, _Tensor]) -> None:
        self.folder = folder
        self._tensors = tensors
        self._files = {
            path: np.memmap(path, dtype=np.uint8, mode="r")
            for path in {tensor.path for tensor in tensors.values()}
        }

    def read(self, name: str) -> NDArray[np.float32]:
        """As float32. Read-only where the file holds float32 itself: the pages come on use."""
        tensor = self._tensors[name]
        end = tensor.first_byte + tensor.num_bytes
        raw = np.asarray(self._files[tensor.path])[tensor.first_byte : end]
        values: NDArray[Any] = raw.view(_DTYPES[tensor.dtype]).reshape(tensor.shape)
        if tensor.dtype == "BF16":
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values.astype(np.float32, copy=False)


def open_checkpoint(folder: Path, shapes: Mapping[str, Shape]) -> Checkpoint:
    """`shapes` are the tensors that must be there; others are ignored. Raises CheckpointError where
    a shard is missing or truncated, or a tensor is missing or of another shape or dtype."""
    tensors: dict[str, _Tensor] = {}
    for path in _shard_paths(folder):
        tensors.update(_read_header(path))
    for name, shape in shapes.items():
        _check_tensor(folder, name, tensors.get(name), shape)
    return Checkpoint(folder, {name: tensors[name] for name in shapes})


def _shard_paths(folder: Path) -> list[Path]:
    if not (folder / INDEX_FILE).exists():
        if not (folder / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; fetch the weights again"
            )
        return [folder / SINGLE_FILE]
    weight_map = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map; fetch it again")
    return [folder / str(name) for name in sorted(set(weight_map.values()))]


def _read_header(path: Path) -> dict[str, _Tensor]:
    """The library checks the header against itself and against the file's size."""
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
        name: _Tensor(
            path=path,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            first_byte=8 + header_bytes + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _check_tensor(folder: Path, name: str, tensor: _Tensor | None, shape: Shape) -> None:
    if tensor is None:
        raise CheckpointError(
            f"{folder}: tensor {name} is missing; fetch the checkpoint again, or check config.json"
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, but config.json asks "
            f"for {list(shape)}; one of the two files belongs to another model"
        )
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(
            f"{tensor.path}: tensor {name} is stored as {tensor.dtype}; convert the checkpoint to "
            f"one of {', '.join(_DTYPES)}"
        )
