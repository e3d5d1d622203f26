"""A checkpoint is read exactly, and whatever is wrong with its files is said when it is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

from gpu_worker.checkpoint.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from gpu_worker.cpu.registry import load_model
from shared.errors import CheckpointError

VALUES = np.array([[1.5, -2.25, 0.0], [3e-5, 65504.0, -1.0]], dtype=np.float32)


@pytest.fixture
def folder(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "copy"))


def failure(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, slots_per_rank=1, kv_blocks=1, block_tokens=4)
    text = str(caught.value)
    assert "\n" not in text
    return text


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    assert len(found) == 2
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_read_exactly_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = torch.from_numpy(VALUES).to(dtype)
    tensors = {"odd": torch.zeros(1, dtype=torch.float16), "w": stored}
    safetensors.torch.save_file(tensors, tmp_path / SINGLE_FILE)
    read = open_checkpoint(tmp_path, {"w": (2, 3)}).read("w")
    assert read.dtype == np.float32
    assert np.array_equal(read, stored.float().numpy())


@pytest.mark.parametrize("lost_bytes", [1, 1000])
def test_a_truncated_shard_is_named(folder: Path, lost_bytes: int) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    assert str(path) in failure(folder)
    assert "truncated" in failure(folder)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, b"<html>not weights</html>"])
def test_a_file_of_something_else_is_named(folder: Path, content: bytes) -> None:
    path = shards(folder)[0]
    path.write_bytes(content)
    assert str(path) in failure(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    path = shards(folder)[0]
    path.unlink()
    assert str(path) in failure(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()
    assert SINGLE_FILE in failure(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', "[]", "{"])
def test_a_malformed_index_is_named(folder: Path, index: str) -> None:
    (folder / INDEX_FILE).write_text(index)
    assert INDEX_FILE in failure(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    assert "model.layers.3." in failure(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    assert "model.embed_tokens.weight has shape [300, 36]" in failure(folder)


def test_a_tensor_of_a_quantised_dtype_is_named(tmp_path: Path) -> None:
    save_file({"w": VALUES.astype(np.int8)}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="w is stored as I8"):
        open_checkpoint(tmp_path, {"w": (2, 3)})


def test_tensors_that_the_architecture_lacks_are_ignored(tmp_path: Path) -> None:
    save_file({"w": VALUES, "more": VALUES.astype(np.int8)}, tmp_path / SINGLE_FILE)
    assert np.array_equal(open_checkpoint(tmp_path, {"w": (2, 3)}).read("w"), VALUES)


def test_another_architecture_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "LlamaForCausalLM" in failure(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"mlp_only_layers": [0, 1, 2]}, "without expert layers"),
        ({"num_experts_per_tok": 9}, "top-9 of 8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 0}, "must be positive"),
        ({"num_attention_heads": None}, "malformed"),
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_is_refused(
    folder: Path, change: dict[str, object], complaint: str
) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    assert complaint in failure(folder)
