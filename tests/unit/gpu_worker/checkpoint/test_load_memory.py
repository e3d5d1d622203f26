"""What loading takes of memory: this rank's share and one tensor, and no page of anybody else's."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from gpu_worker.checkpoint.checkpoint import SINGLE_FILE, Checkpoint, open_checkpoint
from gpu_worker.checkpoint.manifest import write_manifest
from gpu_worker.checkpoint.shards import read_tensors
from gpu_worker.cpu.expert_slots import ExpertSlots, MlpWeights
from gpu_worker.cpu.families.gpt_oss import GptOss
from gpu_worker.cpu.mlp import read_dense, read_mlp
from gpu_worker.cpu.weights import read_matrix, read_panels
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.model_spec import read_model_spec

NUM_EXPERTS = 32
SHAPE = (512, 1024)
TENSOR_BYTES = 2 * 2**20
SHARE = range(20, 32, 3)
SLACK_BYTES = 2**20
MATRICES = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]

LOAD = """
import json, sys
from pathlib import Path
from gpu_worker.checkpoint.checkpoint import open_checkpoint

def status():
    lines = (line.split() for line in open("/proc/self/status"))
    return {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("VmHWM:", "VmRSS:")}

folder, names, shape = Path(sys.argv[1]), json.loads(sys.argv[2]), tuple(json.loads(sys.argv[3]))
checkpoint = open_checkpoint(folder, {name: shape for name in names})
open("/proc/self/clear_refs", "w").write("5")
before = status()["VmRSS:"]
share = [checkpoint.read(name) for name in names]
after = status()
print(json.dumps([after["VmHWM:"] - before, after["VmRSS:"] - before]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MiB of experts, with a manifest."""
    folder = tmp_path_factory.mktemp("experts")
    rng = np.random.default_rng(3)
    experts = {name_of(i): rng.random(SHAPE, dtype=np.float32) for i in range(NUM_EXPERTS)}
    save_file(experts, folder / SINGLE_FILE)
    write_manifest(folder)
    return folder


def name_of(expert: int) -> str:
    return f"expert{expert:02}"


def test_a_rank_never_holds_more_than_its_share_and_one_tensor(folder: Path) -> None:
    names = json.dumps([name_of(expert) for expert in SHARE])
    arguments = [sys.executable, "-c", LOAD, str(folder), names, json.dumps(SHAPE)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=110, check=True)
    peak_bytes, kept_bytes = json.loads(ended.stdout)
    share_bytes = len(SHARE) * TENSOR_BYTES
    assert kept_bytes >= share_bytes - SLACK_BYTES, "it measures nothing"
    assert kept_bytes <= share_bytes + SLACK_BYTES
    assert peak_bytes <= share_bytes + TENSOR_BYTES + SLACK_BYTES


def read_expert(checkpoint: Checkpoint) -> MlpWeights:
    inner_size, hidden_size = SHAPE
    slots = ExpertSlots(
        num_layers=1,
        slots_per_rank=1,
        hidden_size=hidden_size,
        inner_size=inner_size,
        read_expert=lambda layer, expert, slot: read_mlp(checkpoint, "mlp", slot),
    )
    slots.load(0, 0, 0)
    return slots.weights(0)


@pytest.mark.parametrize(
    "read",
    [
        read_expert,
        lambda checkpoint: read_dense(checkpoint, "mlp"),
        lambda checkpoint: read_panels(checkpoint, *MATRICES[:2]),
        lambda checkpoint: read_panels(checkpoint, MATRICES[2]),
        lambda checkpoint: read_matrix(checkpoint, MATRICES[2]),
    ],
    ids=["expert", "dense", "two in panels", "one in panels", "one"],
)
def test_matrices_that_are_kept_together_are_read_one_by_one(
    tmp_path: Path, read: Callable[[Checkpoint], object]
) -> None:
    rng = np.random.default_rng(3)
    tensors = {
        name: rng.random(SHAPE[:: 1 if name in MATRICES[:2] else -1], dtype=np.float32)
        for name in MATRICES
    }
    save_file(tensors, tmp_path / SINGLE_FILE)
    checkpoint = open_checkpoint(tmp_path, {name: w.shape for name, w in tensors.items()})
    kept_bytes, peak_bytes = measured(lambda: read(checkpoint))
    assert kept_bytes >= TENSOR_BYTES, "it measures nothing"
    assert peak_bytes <= kept_bytes + TENSOR_BYTES + SLACK_BYTES


def test_of_experts_stored_together_one_matrix_is_held(tmp_path: Path) -> None:
    """An expert's gate and up are one."""
    inner_size, hidden_size = 512, 512
    create_seeded_checkpoint(
        tmp_path / "m",
        family="gpt_oss",
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_local_experts=3,
        hidden_size=hidden_size,
        intermediate_size=inner_size,
    )
    family = GptOss(read_model_spec(tmp_path / "m"))
    checkpoint = open_checkpoint(tmp_path / "m", family.tensor_shapes())
    slots = ExpertSlots(
        num_layers=1,
        slots_per_rank=1,
        hidden_size=hidden_size,
        inner_size=inner_size,
        read_expert=partial(family.read_expert, checkpoint),
    )
    kept_bytes, peak_bytes = measured(lambda: slots.load(0, 0, 2))
    assert kept_bytes <= SLACK_BYTES
    assert TENSOR_BYTES <= peak_bytes <= TENSOR_BYTES + SLACK_BYTES


def measured(read: Callable[[], object]) -> tuple[int, int]:
    """Bytes that are kept with the result, and the most on the way."""
    tracemalloc.start()
    try:
        result = read()
        kept_bytes, peak_bytes = tracemalloc.get_traced_memory()
        del result
    finally:
        tracemalloc.stop()
    return kept_bytes, peak_bytes


def test_only_the_pages_of_its_own_experts_are_read_from_disk(folder: Path) -> None:
    path = folder / SINGLE_FILE
    evict(path)
    # Whoever reads the header has the kernel read ahead of it, into the first experts.
    beyond = -(-read_tensors(folder)[name_of(SHARE[0] - 1)].first_byte // mmap.PAGESIZE)
    if resident(path)[beyond:].any():
        pytest.skip("this file system keeps all of its files in memory")
    checkpoint = open_checkpoint(folder, {name_of(expert): SHAPE for expert in SHARE})
    for expert in SHARE:
        checkpoint.read(name_of(expert))
    came = resident(path)
    wanted = np.zeros_like(came)
    for expert in SHARE:
        tensor = read_tensors(folder)[name_of(expert)]
        first = tensor.first_byte // mmap.PAGESIZE
        wanted[first : -(-(tensor.first_byte + tensor.num_bytes) // mmap.PAGESIZE)] = True
    assert came[wanted].all()
    assert not came[beyond:][~wanted[beyond:]].any()


def evict(path: Path) -> None:
    """Out of the page cache, where the file system has one."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def resident(path: Path) -> NDArray[np.bool_]:
    """Which pages of the file are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = ctypes.create_string_buffer(-(-len(mapped) // mmap.PAGESIZE))
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.addressof(start), len(mapped), pages)
        del start
        assert not failed, os.strerror(ctypes.get_errno())
        return (np.frombuffer(pages.raw, np.uint8) & 1).astype(bool)[: len(pages)]
