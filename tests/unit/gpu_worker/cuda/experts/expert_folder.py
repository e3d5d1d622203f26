"""Checkpoints that hold only experts, and what slots should hold of them."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.checkpoint.checkpoint import SINGLE_FILE, OnRead, open_checkpoint
from gpu_worker.checkpoint.mlp_names import mlp_shapes
from gpu_worker.cuda.experts.expert_cache import ExpertCacheHeader
from gpu_worker.cuda.experts.expert_reader import ExpertReader
from shared.expert_cache_memory import ExpertCacheMemory, create_memory

NUM_LAYERS, NUM_EXPERTS = 2, 6
HIDDEN, INNER = 8, 4
ENTRIES_AT = 2 * 2**20


def prefix_of(layer: int, expert: int) -> str:
    return f"layers.{layer}.experts.{expert}"


def save_experts(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in _shapes().items()
    }
    save_file(tensors, folder / SINGLE_FILE)
    return folder


def open_experts(folder: Path, dtype: torch.dtype, on_read: OnRead | None = None) -> ExpertReader:
    return ExpertReader(open_checkpoint(folder, _shapes(), on_read), prefix_of, dtype)


def values_of(folder: Path, layer: int, expert: int) -> torch.Tensor:
    """Gate, up and down, flat, as stored."""
    tensors = load_file(folder / SINGLE_FILE)
    names = (f"{prefix_of(layer, expert)}.{n}_proj.weight" for n in ("gate", "up", "down"))
    return torch.cat([tensors[name].flatten() for name in names])


def header_of(folder: Path, reader: ExpertReader) -> ExpertCacheHeader:
    return ExpertCacheHeader(
        folder=str(folder),
        fingerprint=open_checkpoint(folder, _shapes()).fingerprint(),
        dtype=str(reader.form.dtype),
        num_values=reader.form.num_values,
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
    )


def memory_for(num_experts: int) -> ExpertCacheMemory | None:
    """Memory for `num_experts` experts; experts this small take one page each."""
    if num_experts == 0:
        return None
    num_bytes = ENTRIES_AT + num_experts * mmap.PAGESIZE
    return ExpertCacheMemory(fd=create_memory(num_bytes), bytes_max=num_bytes)


def damage(folder: Path, name: str) -> None:
    """Flips one bit of a tensor."""
    path = folder / SINGLE_FILE
    raw = bytearray(path.read_bytes())
    header_bytes = int(np.frombuffer(raw[:8], "<u8")[0])
    header = json.loads(raw[8 : 8 + header_bytes])
    raw[8 + header_bytes + header[name]["data_offsets"][0]] ^= 1
    path.write_bytes(raw)


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            shapes |= mlp_shapes(prefix_of(layer, expert), HIDDEN, INNER)
    return shapes
