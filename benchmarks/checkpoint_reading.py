"""Measures how fast a checkpoint's experts are read, in GB/s of file: from disk and from the page
cache, in each stored form, with and without a manifest.

    python -m benchmarks.checkpoint_reading --mib 512 --tries 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from gpu_worker.checkpoint.checkpoint import SINGLE_FILE, Checkpoint, open_checkpoint
from gpu_worker.checkpoint.manifest import write_manifest
from gpu_worker.checkpoint.shards import Shape, read_tensors
from shared.weights_identity import MANIFEST_FILE

ROWS, COLUMNS = 2048, 7168  # a projection of DeepSeek V3's experts
BLOCK = 128
MIB = 2**20


def plain(count_bytes: int) -> tuple[dict[str, torch.Tensor], dict[str, Shape]]:
    count = max(count_bytes // (2 * ROWS * COLUMNS), 1)
    tensors = {f"e{i}": torch.randn(ROWS, COLUMNS).bfloat16() for i in range(count)}
    return tensors, dict.fromkeys(tensors, (ROWS, COLUMNS))


def fp8(count_bytes: int) -> tuple[dict[str, torch.Tensor], dict[str, Shape]]:
    count = max(count_bytes // (ROWS * COLUMNS), 1)
    values = {f"e{i}": torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn) for i in range(count)}
    scales = {f"{name}_scale_inv": torch.rand(ROWS // BLOCK, COLUMNS // BLOCK) for name in values}
    return values | scales, dict.fromkeys(values, (ROWS, COLUMNS))


def mxfp4(count_bytes: int) -> tuple[dict[str, torch.Tensor], dict[str, Shape]]:
    count = max(count_bytes // (ROWS * COLUMNS // 32 * 17), 1)
    grid = (1, ROWS, COLUMNS // 32)
    tensors = {}
    for i in range(count):
        tensors[f"e{i}_blocks"] = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8)
        tensors[f"e{i}_scales"] = torch.randint(110, 130, grid, dtype=torch.uint8)
    return tensors, {f"e{i}": (1, COLUMNS, ROWS) for i in range(count)}


FORMS = {"BF16": plain, "FP8 blocks": fp8, "MXFP4": mxfp4}


def evict(folder: Path) -> None:
    file = os.open(folder / SINGLE_FILE, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def rate(folder: Path, shapes: dict[str, Shape], *, bits: bool = False) -> float:
    """GB/s of one read of all tensors, by their bytes in the file."""
    num_bytes = sum(tensor.num_bytes for tensor in read_tensors(folder).values())
    checkpoint = open_checkpoint(folder, shapes)
    read = Checkpoint.read_bits if bits else Checkpoint.read
    began = time.perf_counter()
    for name in shapes:
        read(checkpoint, name)
    return num_bytes / 1e9 / (time.perf_counter() - began)


def rates(folder: Path, shapes: dict[str, Shape], tries: int, bits: bool) -> Iterator[float]:
    """Medians: cold, warm, cold with a manifest, warm with a manifest."""
    for with_manifest in (False, True):
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        if with_manifest:
            write_manifest(folder)
        cold, warm = [], []
        for _ in range(tries):
            evict(folder)
            cold.append(rate(folder, shapes, bits=bits))
            warm.append(rate(folder, shapes, bits=bits))
        yield statistics.median(cold)
        yield statistics.median(warm)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512, help="size of each checkpoint")
    parser.add_argument("--tries", type=int, default=5, help="the median of so many")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the usual")
    options = parser.parse_args()
    print("GB/s of file: cold, warm; with a manifest: cold, warm")
    quantisation = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    for form, make in FORMS.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            folder = Path(scratch)
            tensors, shapes = make(options.mib * MIB)
            save_file(tensors, folder / SINGLE_FILE)
            (folder / "config.json").write_text(json.dumps({"quantization_config": quantisation}))
            del tensors
            for bits in (False,) if form == "FP8 blocks" else (False, True):
                found = [f"{r:.2f}" for r in rates(folder, shapes, options.tries, bits)]
                print(
                    f"{form}{' as bits' if bits else ' to float32'}: {', '.join(found)}", flush=True
                )


if __name__ == "__main__":
    main()
