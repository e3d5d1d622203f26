"""With a hash manifest no damaged byte of a weight is read unnoticed, in whatever form it is
stored, and what is damaged is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gpu_worker.checkpoint.checkpoint import SINGLE_FILE, Checkpoint, open_checkpoint
from gpu_worker.checkpoint.manifest import MANIFEST_FILE, verify_folder, write_manifest
from gpu_worker.checkpoint.shards import INDEX_FILE, read_tensors
from gpu_worker.model_tools.__main__ import main
from shared.errors import CheckpointError

SHAPES = {"plain": (6, 4), "fused": (3, 5, 4), "w": (4, 4), "mx": (3, 32, 2), "bias": (3, 4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One tensor of every form, and its manifest."""
    tensors = {
        "plain": torch.arange(24.0).reshape(6, 4),
        "fused": torch.arange(60.0).reshape(3, 5, 4).bfloat16(),
        "w": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "w_scale_inv": torch.ones(2, 2),
        "mx_blocks": torch.zeros(3, 2, 1, 16, dtype=torch.uint8),
        "mx_scales": torch.full((3, 2, 1), 127, dtype=torch.uint8),
        "bias": torch.arange(12.0).reshape(3, 4).bfloat16(),
    }
    safetensors.torch.save_file(tensors, tmp_path / SINGLE_FILE)
    quantisation = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantisation}))
    write_manifest(tmp_path)
    return tmp_path


def damage(folder: Path, stored: str, offset: int) -> None:
    """Turns one bit over, `offset` bytes into the tensor (from its end, where negative)."""
    tensor = read_tensors(folder)[stored]
    data = bytearray(tensor.path.read_bytes())
    data[tensor.first_byte + offset % tensor.num_bytes] ^= 1
    tensor.path.write_bytes(data)


def test_sound_files_are_read_and_verified(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, SHAPES)
    for name, shape in SHAPES.items():
        assert checkpoint.read(name).shape == shape
    for name in ("fused", "mx", "bias"):
        assert checkpoint.read_part(name, 2).shape == SHAPES[name][1:]
    assert verify_folder(folder) == 7


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("plain", lambda c: c.read("plain")),
        ("fused", lambda c: c.read("fused")),
        ("fused", lambda c: c.read_part("fused", 2)),
        ("fused", lambda c: c.read_bits("fused")),
        ("fused", lambda c: c.read_bits_part("fused", 2)),
        ("bias", lambda c: c.read_part("bias", 0)),
        ("w", lambda c: c.read("w")),
        ("w_scale_inv", lambda c: c.read("w")),
        ("mx_blocks", lambda c: c.read_part("mx", 2)),
        ("mx_scales", lambda c: c.read_part("mx", 2)),
        ("mx_scales", lambda c: c.read("mx")),
    ],
)
def test_one_wrong_bit_is_refused_with_its_tensor_and_file(
    folder: Path, stored: str, read: Callable[[Checkpoint], object]
) -> None:
    damage(folder, stored, -1)
    checkpoint = open_checkpoint(folder, SHAPES)
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE}: .*tensor {stored} is damaged"):
        read(checkpoint)
    with pytest.raises(CheckpointError, match=f"tensor {stored} is damaged"):
        verify_folder(folder)


def test_damage_to_one_expert_does_not_keep_the_others_from_being_read(folder: Path) -> None:
    damage(folder, "fused", 0)
    checkpoint = open_checkpoint(folder, SHAPES)
    assert checkpoint.read_part("fused", 1)[0, 0] == 20
    with pytest.raises(CheckpointError, match="part 0 of tensor fused"):
        checkpoint.read_part("fused", 0)


def test_a_shard_of_another_size_is_named_at_the_opening(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    value = json.loads(path.read_text())
    value["shards"][SINGLE_FILE] += 1
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE} has [\d,]+ bytes in place of"):
        open_checkpoint(folder, SHAPES)


def test_a_shard_that_only_the_manifest_knows_is_named(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    value = json.loads(path.read_text())
    value["shards"]["model-2.safetensors"] = 5
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        open_checkpoint(folder, SHAPES)


@pytest.mark.parametrize("stored", ["plain", "mx_scales"])
def test_a_tensor_that_could_not_be_verified_is_named_at_the_opening(
    folder: Path, stored: str
) -> None:
    path = folder / MANIFEST_FILE
    value = json.loads(path.read_text())
    del value["tensors"][stored]
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=f"tensor {stored} is not in {MANIFEST_FILE}"):
        open_checkpoint(folder, SHAPES)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"shards": {}, "tensors": {"plain": 7}}',
        '{"shards": {}, "tensors": {"plain": "abc"}}',
        '{"shards": {}, "tensors": {"plain": [null]}}',
        '{"shards": {"../x": 3}, "tensors": {}}',
        '{"shards": {"x": "3"}, "tensors": {}}',
    ],
)
def test_a_malformed_manifest_is_named(folder: Path, text: str) -> None:
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST_FILE):
        open_checkpoint(folder, SHAPES)


def test_a_tensor_that_the_index_places_in_a_shard_without_it_is_named(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    weight_map = dict.fromkeys([*read_tensors(folder), "lost"], SINGLE_FILE)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: tensor lost is missing"):
        open_checkpoint(folder, SHAPES)


@pytest.mark.parametrize("file", ["../model.safetensors", 3, None])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path, file: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"plain": file}}))
    with pytest.raises(CheckpointError, match="places tensor plain"):
        open_checkpoint(folder, SHAPES)


def test_the_command_writes_verifies_and_names_the_damage(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / MANIFEST_FILE).unlink()
    assert main(["verify", str(folder)]) == 1
    assert "starfish checkpoint manifest" in capsys.readouterr().err
    assert main(["manifest", str(folder)]) == 0
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "7/7"
    damage(folder, "plain", 3)
    assert main(["verify", str(folder)]) == 1
    assert "tensor plain is damaged" in capsys.readouterr().err


def test_the_shipped_models_manifest_is_of_its_files() -> None:
    shipped = Path(__file__).parents[4] / "models" / "starling-14m"
    assert verify_folder(shipped) == len(read_tensors(shipped))
