"""A checkpoint is known by its weights, wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shared.weights_identity import MANIFEST_FILE, weights_identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(b"ab" * 100_000)
    (folder / "model-2.safetensors").write_bytes(b"cd")
    return folder


def test_a_copy_is_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert weights_identity(copy) == weights_identity(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b'{"rms_norm_eps": 1}'),
        ("generation_config.json", b"{}"),
        ("model-1.safetensors", b"ab" * 99_999 + b"xx"),
        ("model-1.safetensors", b"ab" * 100_001),
        ("model-2.safetensors", b"cc"),
        ("model-3.safetensors", b"ef"),
        (MANIFEST_FILE, b"{}"),
    ],
)
def test_another_checkpoint_is_another(folder: Path, file: str, content: bytes) -> None:
    before = weights_identity(folder)
    (folder / file).write_bytes(content)
    assert weights_identity(folder) != before


def test_a_manifest_stands_for_the_shards(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text('{"tensors": {}}')
    before = weights_identity(folder)
    (folder / "model-2.safetensors").unlink()
    assert weights_identity(folder) == before
