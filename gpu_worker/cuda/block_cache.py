"""Contents of a CUDA decoder's KV blocks, out of its caches and into them. Implements
`copies.ports.BlockCache`; who wants which block copied is not its matter.

All that touches the caches is enqueued on the steps' stream, so that the order of calls is the
order of effects, whatever is in flight. The host waits for no step: to save, a block is gathered
into a stage on the device, and goes from there to the host on a side stream; where all stages are
still full the steps' stream waits for the oldest of these copies, which wait for nothing but the
link. To load, the host waits only where as many loads as there are stages have not begun yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gpu_worker.cuda.weights.pinned_memory import PinnedBlock
from gpu_worker.engine.kv_replication import Bytes

NUM_STAGING_BUFFERS = 8
"""Blocks under way in each direction."""


class CudaBlockCache:
    """A block's bytes are those of each cache in turn, of all its layers. `caches` as
    `attention_stage.AttentionStage.cache` gives them. Where they lie in the host's memory, all is
    done at once."""

    def __init__(
        self,
        caches: Sequence[Tensor],
        *,
        architecture: str,
        num_staging_buffers: int = NUM_STAGING_BUFFERS,
    ) -> None:
        """No step may be in flight. Raises OSError where the host refuses to pin memory."""
        self._caches = caches
        self._device = caches[0].device
        self._block_bytes = sum(cache[:, 0].nbytes for cache in caches)
        forms = [f"{cache.dtype} {list(cache[:, 0].shape)}" for cache in caches]
        self._layout = f"cuda {architecture} {', '.join(forms)}"
        self._staging_buffers: list[PinnedBlock] = []
        self._savers = deque(_DeviceStaging(caches) for _ in range(num_staging_buffers))
        self._loaders = deque(
            _HostStaging(self._new_staging_buffer()) for _ in range(num_staging_buffers)
        )
        self._loaded = _DeviceStaging(caches)
        self._side_stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._side_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._warm_up()

    @property
    def block_bytes(self) -> int:
        return self._block_bytes

    @property
    def layout(self) -> str:
        return self._layout

    def staging_buffer(self) -> Bytes:
        """Pinned, in whole pages. Raises OSError where the host refuses."""
        staging_buffer: Bytes = self._new_staging_buffer().numpy()
        return staging_buffer

    def save(self, block: int, into: Bytes) -> Callable[[], bool]:
        self._savers.rotate(-1)
        stage = self._savers[-1]
        if stage.emptied is not None:
            torch.cuda.current_stream(self._device).wait_event(stage.emptied)
        for cache, part in zip(self._caches, stage.parts, strict=True):
            part.copy_(cache[:, block])
        to_host = partial(torch.from_numpy(into).copy_, stage.bytes_B, non_blocking=True)
        if self._side_stream is None:
            to_host()
            return _always
        self._side_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side_stream):
            to_host()
            stage.emptied = self._side_stream.record_event()
        return partial(_has_passed, stage.emptied, self._device)

    def load(self, block: int, content: Bytes) -> None:
        self._loaders.rotate(-1)
        stage = self._loaders[-1]
        if stage.emptied is not None:
            stage.emptied.synchronize()
        np.copyto(stage.values_B, content)
        self._loaded.bytes_B.copy_(stage.bytes_B, non_blocking=True)
        if self._side_stream is not None:
            stage.emptied = torch.cuda.current_stream(self._device).record_event()
        for cache, part in zip(self._caches, self._loaded.parts, strict=True):
            cache[:, block].copy_(part)

    def _warm_up(self) -> None:
        """Kernels are loaded when they are first launched, and that may wait for all that run."""
        content = self._loaders[0].values_B
        self.save(0, content)
        torch.cuda.synchronize(self._device)
        self.load(0, content)
        torch.cuda.synchronize(self._device)

    def _new_staging_buffer(self) -> Tensor:
        staging_buffer = PinnedBlock(self._block_bytes, self._device)
        self._staging_buffers.append(staging_buffer)
        return staging_buffer.bytes_B


class _DeviceStaging:
    """A block's bytes on the device, and the same as its part of each cache."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        blocks = [cache[:, 0] for cache in caches]
        sizes = [block.nbytes for block in blocks]
        self.bytes_B = torch.zeros(sum(sizes), dtype=torch.uint8, device=caches[0].device)
        self.parts = [
            values_B.view(block.dtype).view(block.shape)
            for values_B, block in zip(torch.split(self.bytes_B, sizes), blocks, strict=True)
        ]
        self.emptied: torch.cuda.Event | None = None


class _HostStaging:
    """A block's bytes in pinned memory, for the host as an array."""

    def __init__(self, bytes_B: Tensor) -> None:
        self.bytes_B = bytes_B
        self.values_B: Bytes = bytes_B.numpy()
        self.emptied: torch.cuda.Event | None = None


def _has_passed(event: torch.cuda.Event, device: torch.device) -> bool:
    """On any thread: its own current device need not be this one."""
    with torch.cuda.device(device):
        return bool(event.query())  # type: ignore[no-untyped-call]


def _always() -> bool:
    return True
