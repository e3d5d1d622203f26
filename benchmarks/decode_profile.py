"""The CPU time of decode steps by kernel, and how fast the experts' weights are read. Part of
`benchmarks.model`. Kernels are called as attributes of their modules; while a profile is entered,
timed functions replace them."""

from __future__ import annotations

import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import numpy as np

from gpu_worker.cpu.decoder import Decoder
from gpu_worker.cpu.registry import COMMON_KERNELS, family_class
from gpu_worker.exchange.interface import Dispatched, Exchange


class CountingExchange:
    """Counts the distinct slots whose experts the layers of a step run."""

    def __init__(self, inner: Exchange) -> None:
        self._inner = inner
        self.adopt, self.begin_step = inner.adopt, inner.begin_step
        self.combine = inner.combine
        self.num_slots: list[int] = []

    @property
    def may_change_map(self) -> bool:
        return self._inner.may_change_map

    def dispatch(self, layer: int, x_TH: np.ndarray, experts_TK: np.ndarray) -> Dispatched:
        dispatched = self._inner.dispatch(layer, x_TH, experts_TK)
        self.num_slots.append(np.unique(dispatched.slots_N).size)
        return dispatched


class DecodeProfile:
    """Enter it, call `end_step` after each step (the first is the prefill), then print `table`."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        entry_points = (*COMMON_KERNELS, *family_class(model.spec.architecture).entry_points)
        self._kernels = {kernel.__name__: kernel for kernel, _ in entry_points}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps: list[dict[str, float]] = []

    def __enter__(self) -> DecodeProfile:
        for name, kernel in self._kernels.items():
            setattr(sys.modules[kernel.__module__], name, self._timed(kernel))
        return self

    def __exit__(self, *_: object) -> None:
        for name, kernel in self._kernels.items():
            setattr(sys.modules[kernel.__module__], name, kernel)

    def end_step(self, seconds: float) -> None:
        between = seconds - sum(self._seconds.values())
        self._steps.append({"step": seconds, **self._seconds, "between kernels": between})
        self._seconds.clear()

    def table(self, num_slots: list[int], memory_rate: float) -> str:
        """Medians over the decode steps. `num_slots` are the numbers of distinct experts of each
        layer that ran."""
        decodes = self._steps[1:]
        middle = {name: median(step[name] for step in decodes) for name in decodes[0]}
        lines = [
            f"  {name:16} {1e3 * seconds:6.2f} ms {100 * seconds / middle['step']:4.0f} %"
            for name, seconds in sorted(middle.items(), key=lambda item: -item[1])
        ]
        if num_slots:
            slots = self._model.slots
            expert_bytes = slots.w_gate_up[0, 0].nbytes + slots.w_down[0, 0].nbytes
            step_bytes = fmean(num_slots) * self._model.num_moe_layers * expert_bytes
            rate = step_bytes / middle["run_experts"]
            lines.append(
                f"  {fmean(num_slots):.1f} experts a layer, {step_bytes / 1e6:.0f} MB a step at "
                f"{rate / 1e9:.1f} GB/s; memory gives {memory_rate / 1e9:.1f}"
            )
        return "\n".join(lines)

    def _timed(self, kernel: Any) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def timed(*arguments: Any) -> Any:
            began = time.thread_time()
            result = kernel(*arguments)
            self._seconds[kernel.__name__] += time.thread_time() - began
            return result

        return timed


def measure_memory_rate() -> float:
    """The most bytes a second that one thread reads from memory."""
    values = np.ones(1 << 26, dtype=np.float32)
    seconds = []
    for _ in range(5):
        began = time.thread_time()
        values.max()
        seconds.append(time.thread_time() - began)
    return values.nbytes / min(seconds)
