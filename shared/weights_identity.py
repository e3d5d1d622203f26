"""Which weights a checkpoint folder holds, known without reading them: a short hash that two
folders share if they hold the same checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from shared.errors import CheckpointError

MANIFEST_FILE = "starfish.manifest.json"
"""Hashes of all tensors, beside the shards."""
_ARITHMETIC = ("config.json", "generation_config.json")
_SAMPLE_BYTES = 64 << 10
_HASH_CHARS = 32


def weights_identity(folder: Path) -> str:
    """A hash in hex of the config and of the manifest, which hashes every tensor. A folder without
    a manifest is known by its shards' names, sizes, first and last bytes. Raises CheckpointError if
    a file cannot be read."""
    digest = hashlib.sha256()
    try:
        for name, content in _parts(folder):
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    return digest.hexdigest()[:_HASH_CHARS]


def _parts(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names without folders: a checkpoint that is copied elsewhere stays the same."""
    for name in (*_ARITHMETIC, MANIFEST_FILE):
        if (folder / name).exists():
            yield name, (folder / name).read_bytes()
    if (folder / MANIFEST_FILE).exists():
        return
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            first = file.read(_SAMPLE_BYTES)
            num_bytes = shard.stat().st_size
            file.seek(max(0, num_bytes - _SAMPLE_BYTES))
            yield f"{shard.name}/{num_bytes}", first + file.read()
