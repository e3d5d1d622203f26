"""What is written in pieces is to the byte what the library writes at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.checkpoint.safetensors_file import SafetensorsFile

TENSORS = {
    "b.weight": torch.arange(15, dtype=torch.bfloat16).reshape(3, 5),
    "a.weight": torch.arange(7, dtype=torch.bfloat16),
    "z.correction_bias": torch.arange(4, dtype=torch.float32),
    "half": torch.arange(6, dtype=torch.float16).reshape(1, 2, 3),
}


def opened(path: Path) -> SafetensorsFile:
    shapes = {name: tuple(values.shape) for name, values in TENSORS.items()}
    return SafetensorsFile(path, shapes, {name: v.dtype for name, v in TENSORS.items()})


@pytest.mark.parametrize("backwards", [False, True])
def test_the_bytes_are_the_librarys_in_any_order(tmp_path: Path, backwards: bool) -> None:
    names = sorted(TENSORS, reverse=backwards)
    with opened(tmp_path / "ours") as file, ThreadPoolExecutor(4) as pool:
        written = list(pool.map(lambda name: file.write(name, TENSORS[name]), names))
    assert written == [TENSORS[name].nbytes for name in names]
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_values_that_do_not_lie_in_order_are_written_in_order(tmp_path: Path) -> None:
    with opened(tmp_path / "ours") as file:
        for name, values in TENSORS.items():
            turned = values.transpose(0, -1).contiguous().transpose(0, -1)
            file.write(name, turned)
    loaded = load_file(tmp_path / "ours")
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "ours").write_text("mine")
    with pytest.raises(FileExistsError):
        opened(tmp_path / "ours")
    assert (tmp_path / "ours").read_text() == "mine"
