"""The hash manifest beside a checkpoint's shards: SHA-256 of every tensor's stored bytes, so that a
rank can tell damaged weights from good ones as it reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.shards import MappedShards, StoredTensor, read_tensors
from shared.errors import CheckpointError
from shared.model_spec import read_json
from shared.weights_identity import MANIFEST_FILE

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`hashes` of a tensor: one for the whole tensor, or one for each part if it has parts."""

    shard_bytes: Mapping[str, int]
    hashes: Mapping[str, tuple[str, ...]]


def has_parts(tensor: StoredTensor) -> bool:
    """Whether parts are hashed separately: experts that are stored together are read one by one."""
    return len(tensor.shape) > 2


def hash_of(raw: NDArray[np.uint8]) -> str:
    return hashlib.sha256(raw.data).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if it has none. Raises CheckpointError if the manifest is
    malformed, or if a shard is missing or has another size than the manifest says."""
    if not (folder / MANIFEST_FILE).exists():
        return None
    found = _parse(folder, read_json(folder, MANIFEST_FILE))
    for file, num_bytes in found.shard_bytes.items():
        path = folder / file
        if not path.exists():
            raise CheckpointError(f"{path} is missing; fetch this file again")
        if path.stat().st_size != num_bytes:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes in place of the {num_bytes:,} that "
                f"{MANIFEST_FILE} says; fetch this file again"
            )
    return found


def _parse(folder: Path, value: dict[str, Any]) -> Manifest:
    shards, tensors = value.get("shards"), value.get("tensors")
    if not isinstance(shards, dict) or not isinstance(tensors, dict):
        raise CheckpointError(_malformed(folder, "it wants shards and tensors"))
    hashes = {n: tuple(h) if isinstance(h, list) else (h,) for n, h in tensors.items()}
    for name, parts in hashes.items():
        if not all(isinstance(part, str) and len(part) == 64 for part in parts):
            raise CheckpointError(_malformed(folder, f"tensor {name} has no SHA-256"))
    for name, num_bytes in shards.items():
        if type(num_bytes) is not int or Path(name).name != name:
            raise CheckpointError(_malformed(folder, f"shard {name} has no size"))
    return Manifest(shard_bytes=shards, hashes=hashes)


def _malformed(folder: Path, reason: str) -> str:
    return (
        f"{folder / MANIFEST_FILE} is malformed: {reason}; fetch it again, or write it with "
        "`starfish checkpoint manifest`"
    )


def check_listed(manifest: Manifest, tensor: StoredTensor) -> None:
    """Raises CheckpointError if the manifest cannot verify reads of the tensor."""
    wanted = tensor.shape[0] if has_parts(tensor) else 1
    if len(manifest.hashes.get(tensor.name, ())) != wanted:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} is not in {MANIFEST_FILE} with that shape; the "
            "two are of different checkpoints: fetch both again"
        )


def verify(
    manifest: Manifest, tensor: StoredTensor, raw: NDArray[np.uint8], part: int | None = None
) -> None:
    """`raw` are the bytes of the tensor, or of its `part`. Raises CheckpointError if a hash
    differs."""
    expected = manifest.hashes[tensor.name]
    if part is not None:
        expected = expected[part : part + 1]
    for index, chunk in enumerate(raw.reshape(len(expected), -1)):
        if hash_of(chunk) != expected[index]:
            which = f"part {index if part is None else part} of " if has_parts(tensor) else ""
            raise CheckpointError(
                f"{tensor.path}: {which}tensor {tensor.name} is damaged: its SHA-256 is not that "
                f"of {MANIFEST_FILE}; fetch this file again"
            )


def write_manifest(folder: Path, on_progress: OnProgress | None = None) -> Path:
    """Writes the manifest of the files as they are now, so the files must be known to be good.
    Returns its path."""
    tensors = read_tensors(folder)
    hashes: dict[str, str | list[str]] = {}
    for tensor, raws in _each(tensors, on_progress):
        found = [hash_of(raw) for raw in raws]
        hashes[tensor.name] = found if has_parts(tensor) else found[0]
    shards = {path.name: path.stat().st_size for path in _paths(tensors)}
    value = {"shards": shards, "tensors": dict(sorted(hashes.items()))}
    path = folder / MANIFEST_FILE
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(json.dumps(value, indent=0) + "\n", encoding="utf-8")
    aside.replace(path)
    return path


def verify_folder(folder: Path, on_progress: OnProgress | None = None) -> int:
    """Reads and checks everything. Returns the number of tensors. Raises CheckpointError."""
    tensors, manifest = read_tensors(folder), read_manifest(folder)
    if manifest is None:
        raise CheckpointError(
            f"{folder} has no {MANIFEST_FILE} to verify against; write it with "
            "`starfish checkpoint manifest` where the files are known to be good"
        )
    for name in manifest.hashes:
        if name not in tensors:
            raise CheckpointError(f"{folder}: tensor {name} is missing; fetch the weights again")
    for tensor in tensors.values():
        check_listed(manifest, tensor)
    for tensor, raws in _each(tensors, on_progress):
        for index, raw in enumerate(raws):
            verify(manifest, tensor, raw, index if has_parts(tensor) else None)
    return len(tensors)


def _paths(tensors: Mapping[str, StoredTensor]) -> list[Path]:
    return sorted({tensor.path for tensor in tensors.values()})


def _each(
    tensors: Mapping[str, StoredTensor], on_progress: OnProgress | None
) -> Iterator[tuple[StoredTensor, Iterator[NDArray[np.uint8]]]]:
    """Tensors in the order of the files, each with its parts. The parts must be consumed before the
    next tensor."""
    shards = MappedShards(_paths(tensors))
    in_order = sorted(tensors.values(), key=lambda tensor: (tensor.path, tensor.first_byte))
    for done, tensor in enumerate(in_order):
        yield tensor, _raws(shards, tensor)
        if on_progress is not None:
            on_progress(done + 1, len(in_order))


def _raws(shards: MappedShards, tensor: StoredTensor) -> Iterator[NDArray[np.uint8]]:
    parts = [tensor.part(i) for i in range(tensor.shape[0])] if has_parts(tensor) else [tensor]
    for part in parts:
        with shards.bytes_of(part) as raw:
            yield raw
