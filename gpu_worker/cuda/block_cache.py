"""Copies the contents of KV blocks out of a CUDA decoder's caches and into them. Implements
`engine.kv_replication.BlockCache`. It does not decide which blocks are copied.

Everything that touches the caches is enqueued on the steps' stream, so effects come in the order of
the calls, whatever is in flight. The host waits for no step. `save` gathers a block into a staging
buffer on the device, and a side stream copies it from there to the host. If all staging buffers are
full, the steps' stream waits for the oldest of these copies, which wait only for the link. `load`
makes the host wait only if all staging buffers hold loads that have not begun.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gpu_worker.cuda.streams import on_stream
from gpu_worker.cuda.weights.pinned_memory import PinnedBlock
from gpu_worker.engine.kv_replication import Bytes

NUM_STAGING_BUFFERS = 8
"""Blocks in flight in each direction."""
PINNED_AT_ONCE = 20
"""Staging buffers. Each time takes some ten milliseconds, however little it is."""


class CudaBlockCache:
    """The bytes of a block are those of each cache in turn, for all layers. `caches` come from
    `AttentionStage.cache`. If they are in host memory, every call finishes at once."""

    def __init__(
        self,
        caches: Sequence[Tensor],
        *,
        architecture: str,
        num_staging_buffers: int = NUM_STAGING_BUFFERS,
    ) -> None:
        """No step may be in flight. Raises OSError if the host refuses to pin memory."""
        self._caches = caches
        self._device = caches[0].device
        self._block_bytes = sum(cache[:, 0].nbytes for cache in caches)
        block_shapes = [f"{cache.dtype} {list(cache[:, 0].shape)}" for cache in caches]
        self._layout = f"cuda {architecture} {', '.join(block_shapes)}"
        self._pinned_blocks: list[PinnedBlock] = []
        self._free_staging: deque[Tensor] = deque()
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
        """A pinned buffer of `block_bytes`, in whole pages. Raises OSError if the host refuses."""
        staging_buffer: Bytes = self._new_staging_buffer().numpy()
        return staging_buffer

    def save(self, block: int, into: Bytes) -> Callable[[], bool]:
        self._savers.rotate(-1)
        staging = self._savers[-1]
        if staging.emptied is not None:
            torch.cuda.current_stream(self._device).wait_event(staging.emptied)
        for cache, part in zip(self._caches, staging.parts, strict=True):
            part.copy_(cache[:, block])
        to_host = partial(torch.from_numpy(into).copy_, staging.bytes_B, non_blocking=True)
        if self._side_stream is None:
            to_host()
            return _always
        self._side_stream.wait_stream(torch.cuda.current_stream(self._device))
        with on_stream(self._side_stream):
            to_host()
            staging.emptied = self._side_stream.record_event()
        return partial(_has_passed, staging.emptied, self._device)

    def load(self, block: int, content: Bytes) -> None:
        self._loaders.rotate(-1)
        staging = self._loaders[-1]
        if staging.emptied is not None:
            staging.emptied.synchronize()
        np.copyto(staging.values_B, content)
        self._loaded.bytes_B.copy_(staging.bytes_B, non_blocking=True)
        if self._side_stream is not None:
            staging.emptied = torch.cuda.current_stream(self._device).record_event()
        for cache, part in zip(self._caches, self._loaded.parts, strict=True):
            cache[:, block].copy_(part)

    def _warm_up(self) -> None:
        """A kernel is loaded at its first launch, which may wait for every running kernel. So
        launch them all now."""
        content = self._loaders[0].values_B
        self.save(0, content)
        torch.cuda.synchronize(self._device)
        self.load(0, content)
        torch.cuda.synchronize(self._device)

    def _new_staging_buffer(self) -> Tensor:
        if not self._free_staging:
            in_pages = -(-self._block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            pinned = PinnedBlock(in_pages * PINNED_AT_ONCE, self._device)
            self._pinned_blocks.append(pinned)
            self._free_staging.extend(torch.split(pinned.bytes_B, in_pages))
        return self._free_staging.popleft()[: self._block_bytes]


class _DeviceStaging:
    """A block's bytes on the device, and views of them as the block of each cache."""

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
    """A block's bytes in pinned memory, as a tensor and as an array."""

    def __init__(self, bytes_B: Tensor) -> None:
        self.bytes_B = bytes_B
        self.values_B: Bytes = bytes_B.numpy()
        self.emptied: torch.cuda.Event | None = None


def _has_passed(event: torch.cuda.Event, device: torch.device) -> bool:
    """May run on any thread, whose current device need not be this one."""
    with torch.cuda.device(device):
        return bool(event.query())  # type: ignore[no-untyped-call]


def _always() -> bool:
    return True
