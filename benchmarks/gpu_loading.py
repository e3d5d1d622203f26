"""Measures how fast experts are loaded to a CUDA rank's slots, and how that slows its steps.

    python -m benchmarks.gpu_loading --out FOLDER

Random bf16 experts of Qwen3-30B-A3B's size are in files (by default in memory, as if they were in
the page cache). The rank's own loader loads them: from the checkpoint, and from the copies on the
host that its background thread has made. A step is a captured graph of some milliseconds; the host
waits for its result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from gpu_worker.checkpoint.checkpoint import INDEX_FILE, open_checkpoint
from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.checkpoint.mlp_names import mlp_shapes
from gpu_worker.cuda.experts.expert_cache import ExpertCacheHeader
from gpu_worker.cuda.experts.expert_reader import ExpertReader
from gpu_worker.cuda.experts.host_experts import HostExperts, open_host_experts
from gpu_worker.cuda.experts.slot_loader import open_slot_loader
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.streams import on_stream
from shared.clock import SystemClock
from shared.expert_cache_memory import ExpertCacheMemory, create_memory

HIDDEN, INNER = 2048, 768
STEP_WIDTH, STEP_GEMMS = 8192, 16
GB = 1e9
HEADER_BYTES_MAX = 2**22
FILL_TIMEOUT_S = 300


class Rank:
    """Slots for every expert of a few layers."""

    def __init__(
        self, folder: Path, num_layers: int, num_experts: int, device: torch.device
    ) -> None:
        self._progress = LoadProgress(SystemClock())
        shapes = save_experts(folder, num_layers, num_experts)
        checkpoint = open_checkpoint(folder, shapes, self._progress.count)
        self.reader = ExpertReader(checkpoint, prefix_of, torch.bfloat16)
        self.num_bytes = num_layers * num_experts * self.reader.form.num_bytes
        self._header = ExpertCacheHeader(
            folder=str(folder),
            fingerprint=checkpoint.fingerprint(),
            dtype=str(self.reader.form.dtype),
            num_values=self.reader.form.num_values,
            num_layers=num_layers,
            num_experts=num_experts,
        )
        size = self.num_bytes + HEADER_BYTES_MAX
        self._memory = ExpertCacheMemory(fd=create_memory(size), bytes_max=size)
        self.slots = CudaSlots(
            num_layers=num_layers,
            slots_per_rank=num_experts,
            hidden_size=HIDDEN,
            inner_size=INNER,
            device=device,
        )
        self._num_experts = num_experts
        self._device = device

    def load(self, host_experts: HostExperts, shift: int) -> float:
        """GB/s of one load that changes every slot."""
        loader = open_slot_loader(
            slots=self.slots,
            reader=self.reader,
            host_experts=host_experts,
            progress=self._progress,
            device=self._device,
        )
        wanted = np.roll(np.arange(self._num_experts, dtype=np.int16), shift)
        wanted_LS = np.tile(wanted, (self.slots.num_layers, 1))
        began = time.perf_counter()
        held_LS = loader.load(wanted_LS)
        took_s = time.perf_counter() - began
        assert np.array_equal(held_LS, wanted_LS)
        return wanted_LS.size * self.reader.form.num_bytes / GB / took_s

    def open_copies(self) -> HostExperts:
        """None is complete; all are pinned."""
        copies = open_host_experts(self.reader, self._memory, self._header)
        copies.start_pinning(self._device)
        copies.wait_until_pinned()
        return copies

    def fill(self, host_experts: HostExperts) -> float:
        """GB/s of the background thread that fills the cache."""
        began = time.perf_counter()
        host_experts.fill_in_background()
        assert host_experts.wait_until_filled(FILL_TIMEOUT_S), "the copies take too long"
        return self.num_bytes / GB / (time.perf_counter() - began)


def prefix_of(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}"


def save_experts(folder: Path, num_layers: int, num_experts: int) -> dict[str, tuple[int, ...]]:
    """Writes one shard for each layer; returns the shapes of all tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    weight_map: dict[str, str] = {}
    for layer in range(num_layers):
        of_layer: dict[str, tuple[int, ...]] = {}
        for expert in range(num_experts):
            of_layer |= mlp_shapes(prefix_of(layer, expert), HIDDEN, INNER)
        file = f"layer-{layer}.safetensors"
        save_file(
            {name: torch.randn(shape).bfloat16() for name, shape in of_layer.items()}, folder / file
        )
        shapes |= of_layer
        weight_map |= dict.fromkeys(of_layer, file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return shapes


class Steps:
    """A substitute for decode steps: reads some GB of weights, and the host waits for a result."""

    def __init__(self, device: torch.device) -> None:
        self._x = torch.randn(8, STEP_WIDTH, device=device, dtype=torch.bfloat16)
        self._w = torch.randn(STEP_WIDTH, STEP_WIDTH, device=device, dtype=torch.bfloat16)
        self._y = torch.empty_like(self._x)
        self._host = torch.empty(8, dtype=torch.bfloat16, pin_memory=True)
        self._stream = torch.cuda.Stream(device)
        with on_stream(self._stream):
            self._run()
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._run()

    def measure_during(self, work: Callable[[], float]) -> dict[str, Any]:
        """The result of `work`, and the milliseconds of the steps while it runs."""
        results: list[float] = []
        thread = threading.Thread(target=lambda: results.append(work()))
        thread.start()
        times = []
        with on_stream(self._stream):
            while thread.is_alive():
                began = time.perf_counter()
                self._graph.replay()
                self._host.copy_(self._y[:, 0], non_blocking=True)
                self._stream.synchronize()
                times.append((time.perf_counter() - began) * 1e3)
        thread.join()
        p50, p99, longest = np.percentile(times, [50, 99, 100])
        return {
            "gb_per_s": round(results[0], 2),
            "steps": len(times),
            "step_ms_p50": round(float(p50), 3),
            "step_ms_p99": round(float(p99), 3),
            "step_ms_max": round(float(longest), 3),
        }

    def _run(self) -> None:
        for _ in range(STEP_GEMMS):
            torch.mm(self._x, self._w, out=self._y)


def idle() -> float:
    time.sleep(3)
    return 0.0


def measure(rank: Rank, device: torch.device) -> dict[str, Any]:
    from benchmarks.gpu import link_rate

    steps, none = Steps(device), HostExperts(rank.reader, None)
    link = link_rate()
    host_experts = rank.open_copies()
    results: dict[str, Any] = {
        "card": torch.cuda.get_device_name(device),
        "link_gb_per_s": round(link, 2),
        "steps_alone": steps.measure_during(idle),
        "from_checkpoint": rank.load(none, 0),
        "from_checkpoint_beside_steps": steps.measure_during(lambda: rank.load(none, 1)),
        "filling_beside_steps": steps.measure_during(lambda: rank.fill(host_experts)),
        "from_copies": rank.load(host_experts, 2),
        "from_copies_beside_steps": steps.measure_during(lambda: rank.load(host_experts, 3)),
    }
    results["from_copies_share_of_link"] = round(results["from_copies"] / link, 3)
    beside = results["from_copies_beside_steps"]["gb_per_s"]
    results["from_copies_beside_steps_share_of_link"] = round(beside / link, 3)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("var/bench"))
    parser.add_argument("--files", type=Path, default=Path("/dev/shm"), help="where experts go")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu_loading: no CUDA device here; this measures one")
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory(dir=options.files) as folder:
        rank = Rank(Path(folder), options.layers, options.experts, device)
        results = measure(rank, device)
    text = json.dumps(results, indent=1)
    print(text)
    (options.out / "gpu_loading.json").write_text(text)


if __name__ == "__main__":
    main()
